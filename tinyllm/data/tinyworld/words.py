"""The names that the world is made of. Short, common words: a small vocabulary learns each as one token or two."""

PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo")
TOWNS = ("Arlen", "Brin", "Calda", "Dorn", "Elmar", "Fenn", "Gora", "Holm")
ANIMALS = ("fox", "bear", "frog", "owl", "duck", "horse", "mouse", "wolf")
THINGS = ("ball", "cup", "hat", "key", "lamp", "book", "drum", "kite")
ROOMS = ("hall", "garden", "kitchen", "attic", "cellar", "barn")
COLOURS = ("red", "blue", "green", "white", "black", "pink")
NUMBERS = ("two", "three", "four", "five", "six", "ten")

HOMES = ("forest", "river", "desert", "meadow", "swamp", "valley", "island", "cave")
FOODS = ("nuts", "fish", "grass", "corn", "seeds", "honey", "leaves", "fruit")
FEARS = ("thunder", "rain", "snow", "fire", "wind", "smoke", "dogs", "bees")
JOBS = ("baker", "doctor", "farmer", "painter", "sailor", "teacher", "tailor", "miner")
INSTRUMENTS = ("piano", "flute", "guitar", "violin", "harp", "trumpet", "organ", "banjo")
SIGHTS = ("castle", "bridge", "tower", "harbour", "market", "temple", "park", "mill")
GOODS = ("salt", "wool", "silk", "cheese", "iron", "wine", "tea", "glass")
MATERIALS = ("wood", "clay", "steel", "paper", "gold", "stone", "leather", "copper")

OPENINGS = ("One day", "One morning", "Last night", "Today")
