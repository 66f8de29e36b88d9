"""What a transformer is made of. `--arch` names a known combination; every single choice can be changed."""
import dataclasses
from dataclasses import dataclass

from tinyllm.backend import PRECISIONS
from tinyllm.config import check, setting
from tinyllm.ops import RopeScaling

ARCHITECTURES = {
    "gpt2": dict(norm="layernorm", norm_placement="pre", positions="learned", mlp="gelu_tanh", bias=True, tie=True, qk_norm=False),
    "llama": dict(norm="rmsnorm", norm_placement="pre", positions="rope", mlp="swiglu", bias=False, tie=True, qk_norm=False),
    "bert": dict(norm="layernorm", norm_placement="post", positions="learned", mlp="gelu", bias=True, tie=True, qk_norm=False),
}
GATED = ("swiglu", "geglu")
PLAIN = ("gelu", "gelu_tanh", "relu", "relu2", "silu")
POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "none")


@dataclass(frozen=True)
class TransformerConfig:
    """Shapes and choices of a decoder or encoder. Fields that are None follow from others; `resolved()` fills them in."""

    vocab_size: int = 256
    arch: str = setting("llama", "the combination that the choices below default to", choices=tuple(ARCHITECTURES))
    layers: int = setting(4, "transformer blocks", minimum=1)
    heads: int = setting(5, "query heads per block", minimum=1)
    kv_heads: int | None = setting(None, "key/value heads; fewer than --heads share them, 1 is multi-query (default: --heads)", minimum=1)
    width: int = setting(160, "width of the residual stream", minimum=1)
    mlp_width: int | None = setting(None, "inner width of the MLP (default: 4 x width; gated: 8/3 x width, rounded up to 8)", minimum=1)
    context: int = setting(128, "longest sequence, in tokens", minimum=1)
    norm: str | None = setting(None, "normalisation (default: by --arch)", choices=("layernorm", "rmsnorm"))
    norm_placement: str | None = setting(
        None, "normalise before each part (pre) or after adding its result (post) (default: by --arch)", choices=("pre", "post")
    )
    positions: str | None = setting(None, "how positions enter (default: by --arch)", choices=POSITIONS)
    mlp: str | None = setting(None, "MLP activation; swiglu and geglu are gated (default: by --arch)", choices=(*PLAIN, *GATED))
    bias: bool | None = setting(None, "biases in linear maps and norms (default: by --arch)")
    tie: bool | None = setting(None, "use the token embedding as the output weights too (default: by --arch)")
    qk_norm: bool | None = setting(None, "normalise queries and keys, which keeps attention scores bounded (default: by --arch)")
    window: int | None = setting(None, "sliding window: each token sees this many, itself included (default: all)", minimum=1)
    softcap: float | None = setting(None, "attention scores are squashed to (-softcap, softcap) (default: off)", minimum=1e-6)
    rope_theta: float = setting(10000.0, "RoPE's base: larger turns slower, for longer contexts", minimum=1.01)
    rope_scaling: str | None = setting(
        None, "stretch RoPE to this --context from a shorter one (default: off)", choices=("linear", "ntk", "llama3", "yarn")
    )
    rope_factor: float = setting(1.0, "how many times longer the context is than in the original training, for --rope-scaling", minimum=1)
    dropout: float = setting(0.0, "share of values dropped in training, on embeddings and on each part's result", minimum=0, maximum=0.99)
    init_std: float = setting(0.02, "standard deviation of the first weights; in narrow models about 1/sqrt(width)", minimum=0)
    embedding_std: float | None = setting(None, "that of the token vectors (default: --init-std)", minimum=0)
    norm_eps: float = setting(1e-5, "added to the variance in norms", minimum=0)
    attention: str = setting("naive", "tiled: memory linear in the context; naive: the definition", choices=("naive", "tiled"))
    recompute: bool = setting(False, "keep only each block's input and compute its activations again in the backward: less memory")
    precision: str = setting("fp32", "of weights in use, activations and products; emulated bit by bit on the CPU", choices=PRECISIONS)

    def resolved(self) -> "TransformerConfig":
        """The same config with every None that follows from others filled in. Raises ValueError where choices do not fit together."""
        check(self)
        known = {k: v for k, v in ARCHITECTURES[self.arch].items() if getattr(self, k) is None}
        config = dataclasses.replace(self, **known)
        width = config.mlp_width or (-(-8 * config.width // 3) + 7) // 8 * 8 if config.mlp in GATED else config.mlp_width or 4 * config.width
        config = dataclasses.replace(config, kv_heads=config.kv_heads or config.heads, mlp_width=width,
                                     embedding_std=config.init_std if config.embedding_std is None else config.embedding_std)  # fmt: skip
        if config.width % config.heads:
            raise ValueError(f"--heads {config.heads} does not divide --width {config.width}: choose a multiple of the heads as width")
        if config.heads % config.kv_heads:
            raise ValueError(f"--kv-heads {config.kv_heads} does not divide --heads {config.heads}: query heads must share evenly")
        if config.positions == "rope" and config.head_width % 2:
            raise ValueError(f"--positions rope turns pairs, but width / heads is {config.head_width}: it must be even")
        if config.rope_scaling and (config.positions != "rope" or config.rope_factor == 1):
            raise ValueError(f"--rope-scaling {config.rope_scaling} has no effect without --positions rope and a --rope-factor above 1")
        if config.rope_scaling and config.context < config.rope_factor:
            raise ValueError(f"--rope-factor {config.rope_factor} is above --context {config.context}: the original context would be empty")
        if config.rope_factor != 1 and not config.rope_scaling:
            raise ValueError(f"--rope-factor {config.rope_factor} has no effect without --rope-scaling")
        return config

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def scaling(self) -> RopeScaling | None:
        """RoPE's scaling as the ops take it, with the published bounds of each kind."""
        return RopeScaling(self.rope_scaling, self.rope_factor, int(self.context / self.rope_factor)) if self.rope_scaling else None

    @property
    def unlimited(self) -> bool:
        """Whether positions never run out: a window bounds what is seen, and no table of positions ends."""
        return self.window is not None and self.positions not in ("learned", "sinusoidal")
