"""What can be chosen when text is generated."""
import dataclasses
from dataclasses import dataclass

from tinyllm.config import check, option_name, setting

SHARED = ("max_tokens", "stop", "seed", "beams", "length_penalty")  # what has a meaning when nothing is drawn


@dataclass(frozen=True)
class SamplingConfig:
    """How a continuation is chosen and when it ends. Raises ValueError for values out of range or without a meaning together."""

    max_tokens: int = setting(100, "longest continuation, in tokens", minimum=1)
    temperature: float = setting(0.8, "below 1 sharpens the distribution, above flattens it; 0 always takes the likeliest token", minimum=0)
    top_k: int = setting(0, "draw from this many likeliest tokens (0: from all)", minimum=0)
    top_p: float = setting(1.0, "draw from the fewest likeliest tokens that hold this probability together", minimum=0, maximum=1)
    min_p: float = setting(0.0, "drop tokens less likely than this share of the likeliest one's probability", minimum=0, maximum=1)
    typical: float = setting(
        1.0, "draw from tokens about as surprising as expected that hold this probability together", minimum=0, maximum=1
    )
    repetition_penalty: float = setting(1.0, "scale down logits of tokens in prompt and continuation (1: off; 1.2 is usual)", minimum=1)
    presence_penalty: float = setting(0.0, "lower the logits of tokens in the continuation by this, once", minimum=-100, maximum=100)
    frequency_penalty: float = setting(0.0, "lower the logits of tokens by this for each time in the continuation", minimum=-100, maximum=100)
    stop: tuple[str, ...] = setting((), "end before the first of these texts")
    seed: int = setting(0, "the same seed gives the same text", minimum=0)
    beams: int = setting(1, "search for the likeliest continuation with this many candidates, instead of drawing one (1: draw)", minimum=1)
    length_penalty: float = setting(0.6, "with --beams: 0 favours short texts, higher favours longer ones", minimum=0, maximum=10)

    def __post_init__(self):
        check(self)
        if "" in self.stop:
            raise ValueError("--stop is empty: it must be a text of at least one character")
        if self.beams > 1:
            for field in dataclasses.fields(self):
                if field.name not in SHARED and getattr(self, field.name) != field.default:
                    raise ValueError(
                        f"{option_name(field.name)} changes how tokens are drawn, but --beams {self.beams} draws none: leave one of them out"
                    )
