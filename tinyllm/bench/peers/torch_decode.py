"""Greedy decoding of the same model in PyTorch, eager, with a cache of keys and values that is laid out in advance: nothing is ever copied
or waited for between two tokens, so that it is as fast as calling one operation after the other can be."""
import torch
from torch import nn
from torch.nn import functional as F

FORMATS = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, batch: int, context: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("cache", torch.zeros(2, batch, heads, context, width // heads))

    def forward(self, x, start: int):
        """(B, T, C), the positions from `start` on -> the same, with keys and values up to there."""
        (B, T, C), (_, _, H, _, D) = x.shape, self.cache.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        self.cache[0, :, :, start : start + T] = k
        self.cache[1, :, :, start : start + T] = v
        keys, values = self.cache[:, :, :, : start + T]
        y = F.scaled_dot_product_attention(q, keys, values, is_causal=T > 1)  # T > 1 in the prompt alone, where start is 0
        x = x + self.output(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Model(nn.Module):
    def __init__(self, settings: dict):
        super().__init__()
        width, context = settings["width"], settings["context"]
        self.tokens, self.positions = nn.Embedding(settings["vocab"], width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, settings["heads"], settings["batch"], context) for _ in range(settings["layers"]))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids, start: int):
        """(B, T) ids, the positions from `start` on -> (B, 1), the likeliest next ones."""
        x = self.tokens(ids) + self.positions.weight[start : start + ids.shape[1]]
        for block in self.blocks:
            x = block(x, start)
        return F.linear(self.norm(x[:, -1:]), self.tokens.weight).argmax(-1)


def run(settings, meter):
    """Continue a batch of random prompts, once for each of meter.units."""
    gpu, prompt = settings["device"] == "cuda", settings["prompt"]
    meter.notes["version"] = torch.__version__.partition("+")[0]
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    with torch.device(settings["device"]), torch.inference_mode():
        model = Model(settings).to(FORMATS[settings["precision"]])
        prompts = torch.randint(settings["vocab"], (settings["batch"], prompt))
        meter.wait = torch.cuda.synchronize if gpu else meter.wait
        meter.start()
        for _ in range(meter.units):
            new = [model(prompts, 0)]
            for position in range(prompt, prompt + settings["new"] - 1):
                new.append(model(new[-1], position))
            torch.cat(new, 1).tolist()
            meter.tick()
    if gpu:
        meter.notes["peak_mb"] = torch.cuda.max_memory_reserved() / 1e6
