"""Finding tasks: packages by their folder, registered tasks by what they and their tags define."""

from collections.abc import Iterator

import pytest

from fimaq_core.errors import RecipeError
from tasks.common import registry
from tasks.common.request import ModelRequest
from tasks.common.task import Task
from tasks.retrieval import tags


class Registered(Task):
    name = "mine"
    tags = tags
    scopes = ("all",)

    def model_tag(self, request: ModelRequest) -> str:
        return "mine.tag"


@pytest.fixture
def task() -> Iterator[Task]:
    task = Registered()
    registry.register_task(task)
    yield task
    del registry._REGISTERED["mine"]


def test_packages_are_tasks() -> None:
    assert registry.TASKS == ("classification", "deepfake", "detection", "retrieval")
    for name in registry.TASKS:
        assert registry.get_task(name).name == name
    with pytest.raises(RecipeError, match=r"Unknown task 'retrival'\. Did you mean 'retrieval'"):
        registry.get_task("retrival")


def test_a_registered_task_wins_over_its_tags(task: Task) -> None:
    assert registry.get_task("mine") is task
    assert registry.model_tag("mine", ModelRequest("demo_clip")) == "mine.tag"
    assert registry.scopes("mine") == ("all",)
    assert registry.evaluations("mine") == tags.EVALUATIONS
    assert registry.parts("mine", "vision") == {"vision": "vision"}
    with pytest.raises(RecipeError, match="exists already"):
        registry.register_task(task)
