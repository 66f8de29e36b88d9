"""Every stage on a device learns what it learns on the CPU, and what it leaves is used there and on the CPU."""
import pytest
from device_worlds import WORLDS, entered
from tiny_run import back_to, history
from tiny_stages import RUNS, Life

from tinyllm.backend import array_module, deterministic
from tinyllm.cli.main import main
from tinyllm.stages import load_run, resume, stage_config
from tinyllm.threads import threads
from tinyllm.train.run import Run

pytest.importorskip("ml_dtypes")


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    return Life(tmp_path_factory.mktemp("life"))


@pytest.fixture(params=WORLDS)
def world(request):
    with entered(request.param) as world:
        yield world


@pytest.fixture(autouse=True)
def undone():
    """What a run has set for the process."""
    before = threads()
    yield
    threads(before)
    deterministic(False)


def figures(run, *events):
    """(event, step, figure, value) of everything that was logged."""
    return {(r["event"], r["step"], name): value for r in history(run) for name, value in r.items()
            if name not in ("event", "step", "path", "seconds") and (not events or r["event"] in events)}  # fmt: skip


# --threads 1: several processes draw dropout each for its own rows.
@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("instruct padded", "dpo lora", "simpo", "classify")])
def test_a_stage_learns_on_a_device_what_it_learns_on_the_cpu(world, life, tmp_path, name):
    here, there = (life.run(name, tmp_path / device, "--device", device, "--threads", 1, "--log-every", 1) for device in ("cpu", "cuda"))
    expected, ours = figures(here), figures(there)
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert ours[key] == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-4)), key


@pytest.mark.parametrize("name", ["instruct lora", "ppo"])
def test_a_stage_moves_between_devices_when_it_is_resumed(world, life, tmp_path, name):
    here = life.run(name, tmp_path / "cpu", "--threads", 1, "--log-every", 1)
    there = life.run(name, tmp_path / "cuda", "--device", "cuda", "--threads", 1, "--log-every", 1)
    back_to(there, 6)
    assert main([*RUNS[name][0], "--resume", str(there), "--device", "cpu"]) == 0
    expected, ours = figures(here, "step"), figures(there, "step")
    assert {key: ours[key] for key in expected} == {key: pytest.approx(value, rel=1e-3, abs=1e-4) for key, value in expected.items()}


@pytest.mark.parametrize("name", ["instruct lora", "dpo", "grpo", "ppo"])
def test_models_of_a_stage_are_used_on_a_device(world, life, tmp_path, name, capsys):
    run = life.run(name, tmp_path / "run")
    model, _, _ = load_run(run, device="cuda")
    assert {array_module(p.data) for _, p in model.named_parameters()} == {world.xp}
    capsys.readouterr()
    said = []
    for device in ("cpu", "cuda"):
        assert main(["sample", str(run), "--prompt", "the", "--max-tokens", "5", "--temperature", "0", "--device", device]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["classify", "ppo"])
def test_everything_that_learns_is_on_the_device(world, life, tmp_path, name):
    run = life.run(name, tmp_path / "run", "--device", "cuda", "--threads", 1)
    back_to(run, 6)
    outcome = resume(Run(run), stage_config(Run(run)))
    assert {array_module(p.data) for _, p in outcome.trainer.model.named_parameters()} == {world.xp}
