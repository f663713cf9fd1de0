"""Stages of a run that are done once for the same inputs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfreg.utils.files import fingerprint_json, read_json, write_json


class Stages:
    """Keeps, for each stage, what went in and what came out, so that a run goes on where an earlier one ended.

    A stage is marked only after all it wrote is in place: killed before, it is done again.

    Args:
        folder: where the marks lie.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    @staticmethod
    def key_of(inputs: Any) -> str:
        """A short name for inputs."""
        return fingerprint_json(inputs)[:12]

    def run(
        self, name: str, inputs: Any, work: Callable[[], Any], *, outputs: tuple[Path, ...] = ()
    ) -> tuple[Any, bool]:
        """The result of a stage, which JSON can hold.

        Args:
            name: of the stage.
            inputs: all that its result depends on, as JSON.
            work: does it; writes `outputs` and returns the result.
            outputs: files or folders that must be there for the stage to count as done.

        Returns:
            the result, and whether it was there already.
        """
        path = self.folder / f"{name}.json"
        key = fingerprint_json(inputs)
        if path.exists():
            mark = read_json(path)
            if mark["key"] == key and all(output.exists() for output in outputs):
                return mark["result"], True
            # Outputs are replaced one after the other: without the mark they can't be taken for a whole.
            path.unlink()
        result = work()
        write_json(path, {"stage": name, "key": key, "result": result})
        # What a later run will read, so that both see the same numbers.
        return read_json(path)["result"], False


def again(was_there: bool) -> str:
    """For the line that tells of a stage."""
    return " (done before)" if was_there else ""
