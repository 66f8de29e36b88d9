"""What tests of the device share: where they run (see device_worlds)."""
import pytest
from device_worlds import WORLDS, entered


@pytest.fixture(params=WORLDS)
def world(request):
    """The fake device and a real GPU, one after the other."""
    with entered(request.param) as world:
        yield world


@pytest.fixture
def fake():
    """The fake device alone."""
    with entered("fake") as world:
        yield world
