"""One definition of a setting: its check, its name on the command line, and reading it back from JSON."""
import dataclasses
from dataclasses import dataclass

import pytest

from tinyllm.config import check, from_dict, option_name, setting, suggestion, value_type


@dataclass(frozen=True)
class Example:
    size: int = setting(4, "how big", minimum=1, maximum=10)
    rate: float | None = setting(None, "how fast (default: by size)", minimum=0)
    kind: str = setting("cosine", "which", choices=("cosine", "linear"))
    files: tuple[str, ...] = setting((), "which files")
    on: bool = setting(False, "whether")
    code: int | None = setting(None, "one of a few", choices=(1, 2))
    plain: str = "no setting"


def test_defaults_and_good_values_pass():
    check(Example())
    check(Example(size=1, rate=0.0, kind="linear", files=("a",), on=True, code=2))
    check(Example(size=10))
    check(Example(plain=3))  # a field without limits is not this function's business


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(size=0), "--size is 0: it must be at least 1"),
        (dict(size=11), "--size is 11: it must be at most 10"),
        (dict(rate=-0.5), "--rate is -0.5: it must be at least 0"),
        (dict(rate=float("nan")), "--rate is nan: it must be at least 0"),
        (dict(kind="cosin"), "--kind is 'cosin': it takes cosine, linear; did you mean cosine?"),
        (dict(kind="zigzag"), "--kind is 'zigzag': it takes cosine, linear"),
        (dict(code=3), "--code is 3: it takes 1, 2"),
    ],
)
def test_bad_values_get_a_line_that_names_the_option(values, message):
    with pytest.raises(ValueError) as error:
        check(Example(**values))
    assert str(error.value) == message


def test_names_on_the_command_line():
    assert option_name("weight_decay") == "--weight-decay"


def test_plain_types_of_fields():
    kinds = {f.name: value_type(Example, f) for f in dataclasses.fields(Example)}
    assert kinds == dict(size=int, rate=float, kind=str, files=str, on=bool, code=int, plain=str)


def test_a_config_comes_back_from_its_dictionary():
    config = Example(size=3, rate=0.25, files=("a", "b"), on=True)
    values = dataclasses.asdict(config)
    values["files"] = list(values["files"])  # as JSON gives it
    assert from_dict(Example, values, "config.json") == config
    assert from_dict(Example, {}, "config.json") == Example()


def test_an_unknown_name_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match=r"run/config.json: unknown setting 'szie'; did you mean size\?"):
        from_dict(Example, {"szie": 3}, "run/config.json")
    with pytest.raises(ValueError, match="unknown setting 'xyz'$"):
        from_dict(Example, {"xyz": 3}, "config.json")


def test_suggestions():
    assert suggestion("--lerning-rate", ["--learning-rate", "--rate"]) == "; did you mean --learning-rate?"
    assert suggestion("3", [30, 300]) == "; did you mean 30?"
    assert suggestion("nothing like it", ["a", "b"]) == "" and suggestion("a", []) == ""
