"""Write optim.npz with PyTorch. Run in this folder, in an environment with the `peers` extra.

Every run trains a matrix, which decays, and a vector, which does not, with given gradients; RUNS names PyTorch's class and settings.
"""
import numpy as np
import torch

STEPS = 12
RUNS = {
    "adamw": (torch.optim.AdamW, dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)),
    "adamw_big_eps": (torch.optim.AdamW, dict(betas=(0.8, 0.999), eps=0.1, weight_decay=0.5)),
    "sgd": (torch.optim.SGD, dict(momentum=0.0, nesterov=False, weight_decay=0.1)),
    "sgd_momentum": (torch.optim.SGD, dict(momentum=0.9, nesterov=False, weight_decay=0.1)),
    "sgd_nesterov": (torch.optim.SGD, dict(momentum=0.7, nesterov=True, weight_decay=0.2)),
}


def trajectory(kind, settings, start, gradients, rates):
    """The values after each step: {name: (STEPS, …)}."""
    parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    groups = [{"params": [p], "weight_decay": settings["weight_decay"] if p.ndim >= 2 else 0.0} for p in parameters.values()]
    optimizer = kind(groups, lr=1.0, **settings)
    values = {name: [] for name in start}
    for step, lr in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in parameters.items():
            p.grad = torch.tensor(gradients[name][step])
        optimizer.step()
        for name, p in parameters.items():
            values[name].append(p.detach().numpy().copy())
    return {name: np.stack(v) for name, v in values.items()}


def clipped(gradient, maximum):
    """PyTorch's norm and its clipped gradient."""
    p = torch.nn.Parameter(torch.zeros(len(gradient), dtype=torch.float64))
    p.grad = torch.tensor(gradient)
    norm = torch.nn.utils.clip_grad_norm_([p], maximum)
    return norm.item(), p.grad.numpy()


def loss_scales(finite, initial, growth_interval):
    """The scale after each step of PyTorch's GradScaler."""
    scale, tracker = torch.tensor([initial]), torch.tensor([0], dtype=torch.int32)
    scales = []
    for good in finite:
        torch._amp_update_scale_(scale, tracker, torch.tensor([0.0 if good else 1.0]), 2.0, 0.5, growth_interval)
        scales.append(scale.item())
    return scales


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    start = {"w": rng.standard_normal((3, 5)), "b": rng.standard_normal(5)}
    gradients = {name: rng.standard_normal((STEPS, *value.shape)) * np.logspace(1, -4, value.shape[-1]) for name, value in start.items()}
    rates = np.linspace(0.1, 0.01, STEPS)
    arrays = {"rates": rates} | {f"start.{k}": v for k, v in start.items()} | {f"gradients.{k}": v for k, v in gradients.items()}
    for run, (kind, settings) in RUNS.items():
        arrays |= {f"{run}.{name}": values for name, values in trajectory(kind, settings, start, gradients, rates).items()}
    arrays["clip.maxima"] = np.array([0.5, 1.0, 100.0])
    results = [clipped(start["w"].ravel(), maximum) for maximum in arrays["clip.maxima"]]
    arrays["clip.norm"], arrays["clip.gradients"] = np.array(results[0][0]), np.stack([g for _, g in results])
    arrays["scaler.finite"] = rng.random(60) < 0.8
    arrays["scaler.scales"] = np.array(loss_scales(arrays["scaler.finite"], 2.0**16, 3))
    np.savez_compressed("optim.npz", **arrays)
