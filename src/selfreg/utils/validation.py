"""What pydantic found wrong in a file that a person wrote, in words that name the key and the mend."""

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError


def explain_errors(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each thing that is wrong: an unknown key with the nearest one of `model` at that place, a
    missing one with what it holds."""
    lines = []
    for entry in error.errors():
        where = ".".join(str(part) for part in entry["loc"])
        if entry["type"] == "extra_forbidden":
            *parents, wrong = entry["loc"]
            known = list(_part(model, parents).model_fields)
            nearest = difflib.get_close_matches(str(wrong), known, n=1, cutoff=0.3)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known)}"
            lines.append(f"unknown key {where!r}{hint}")
        elif entry["type"] == "missing":
            *parents, missing = entry["loc"]
            about = _part(model, parents).model_fields[str(missing)].description
            lines.append(f"{where!r} is missing" + (f": {about}" if about else ""))
        else:
            message = entry["msg"].removeprefix("Value error, ")
            given = "" if isinstance(entry["input"], dict) else f" (given: {entry['input']!r})"
            lines.append(f"{where}: {message}{given}".removeprefix(": "))
    return lines


def _part(model: type[BaseModel], path: Sequence[Any]) -> type[BaseModel]:
    """The part of `model` at `path`."""
    part = model
    for key in path:
        name = str(key)
        if name not in part.model_fields:
            # A name that the user chose, as in data.eval, or a place in a list.
            continue
        found = _models_in(part.model_fields[name].annotation)
        if found:
            part = found[0]
    return part


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]
