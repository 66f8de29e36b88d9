"""Greedy decoding of the same model by transformers' generate, with its cache."""
import torch
import transformers

FORMATS = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


def run(settings, meter):
    """Continue a batch of random prompts, once for each of meter.units."""
    meter.notes["version"] = transformers.__version__
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=settings["vocab"], n_positions=settings["context"], n_embd=settings["width"], n_layer=settings["layers"],
        n_head=settings["heads"], bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    device, gpu = settings["device"], settings["device"] == "cuda"
    model = transformers.GPT2LMHeadModel(config).eval().to(device, FORMATS[settings["precision"]])
    prompts = torch.randint(settings["vocab"], (settings["batch"], settings["prompt"]), device=device)
    new = settings["new"]
    meter.wait = torch.cuda.synchronize if gpu else meter.wait
    with torch.inference_mode():
        meter.start()
        for _ in range(meter.units):
            ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=False, pad_token_id=0)
            meter.tick()
            if ids.shape[1] != prompts.shape[1] + new:
                raise RuntimeError(f"generate made {ids.shape[1] - prompts.shape[1]} tokens a row, not {new}")
    if gpu:
        meter.notes["peak_mb"] = torch.cuda.max_memory_reserved() / 1e6
