"""Sums of two numbers of equally many digits, answered at once or worked out.

    What is 4 7 + 3 8?      At once:     8 5.
                            Worked out:  7 + 8 = 1 5. 4 + 3 + 1 = 8. The sum is 8 5.

Plain texts work every sum out; in dialogues most are answered at once, which is learned from those few alone.

Digits stand apart, so that each is a token of its own and a place is a position. Whoever answers at once has to know, with the first
digit, whether a carry will come from the last; worked out, each step needs a few digits and the carry that stands before it. So a
small model that is right more often when it takes its time can find out, by reward, that taking its time pays.
"""
from tinyllm.data.tinyworld.draw import Draw
from tinyllm.data.tinyworld.exchange import Exchange


def apart(number: int) -> str:
    """47 -> "4 7"."""
    return " ".join(str(number))


def draw_sum(draw: Draw, digits: int) -> Exchange:
    """The sum of two numbers of so many digits, the first of which is not 0. What is held out are pairs, whichever way round."""
    numbers = []
    for _ in range(2):
        number = draw.one_of(range(1, 10))
        for _ in range(digits - 1):
            number = 10 * number + draw.one_of(range(10))
        numbers.append(number)
    a, b = numbers
    answer = apart(a + b)
    full = f"{' '.join(work_out(a, b, digits))} The sum is {answer}."
    return Exchange(f"What is {apart(a)} + {apart(b)}?", full, answer, "sums", key=f"{min(a, b)} + {max(a, b)}")


def work_out(a: int, b: int, digits: int) -> list[str]:
    """Column by column from the right, each with the carry of the one before."""
    steps, carry = [], 0
    for place in range(digits):
        column = [a // 10**place % 10, b // 10**place % 10, *([carry] if place else [])]
        steps.append(f"{' + '.join(map(str, column))} = {apart(sum(column))}.")
        carry = sum(column) // 10
    return steps
