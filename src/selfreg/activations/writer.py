"""StoreWriter: writes a store shard by shard, in one process or in several, each its own shards.

A shard is a file that appears whole, under its number, and says itself what it holds. So any number of processes can
write at once, and whoever goes on after a kill sees what is there.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from selfreg.activations.prompt import Pooling
from selfreg.activations.spec import HiddenStateSpec
from selfreg.activations.store import FORMAT_VERSION, MANIFEST, SHARDS, StoreShard, save_tensors
from selfreg.utils.files import fingerprint_json, read_json, remove_partial, write_json
from selfreg.utils.processes import gather_all, processes

_OF = "selfreg.store"


class StoreWriter:
    """Writes a store, and goes on where an earlier writer was cut short. Every process has to make one.

    Raises:
        ValueError: the folder holds a store of other texts, another backbone or other settings, or the processes were
            given different ones.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: HiddenStateSpec,
        *,
        text_fingerprint: str,
        num_texts: int,
        dtype: torch.dtype,
        pooling: Pooling,
        shard_tokens: int,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.dtype = dtype
        wanted: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "spec": spec.to_dict(),
            "dtype": str(dtype).removeprefix("torch."),
            "text_fingerprint": text_fingerprint,
            "num_texts": num_texts,
            "with_cls_states": pooling == "cls",
            "shard_tokens": shard_tokens,
        }
        # What a shard has to be of, to be one of this store.
        self._key = fingerprint_json(wanted)
        if len(set(gather_all(self._key))) > 1:
            raise ValueError("every process has to be given the same texts, in the same order, and the same settings")
        held = self._held_manifest()
        if held is not None and not overwrite:
            _check_same(self.path, held, wanted)
        # All have seen what was there before the first writes.
        processes().wait_for_everyone()
        if processes().is_main_process:
            remove_partial(self.path)
            if held is None or overwrite:
                for entry in held["shards"] if held is not None else ():
                    (self.path / entry["file"]).unlink(missing_ok=True)
                new = {**wanted, "shape": [0, spec.hidden_size], "shards": [], "complete": False}
                write_json(self.path / MANIFEST, new)
        processes().wait_for_everyone()
        manifest = self._held_manifest()
        if manifest is None:
            raise ValueError(f"{self.path} is not seen by all processes: the folder has to be one that they share")
        self.manifest = manifest

    def _held_manifest(self) -> dict[str, Any] | None:
        manifest = self.path / MANIFEST
        return read_json(manifest) if manifest.exists() else None

    @property
    def complete(self) -> bool:
        return self.manifest["complete"]

    def held(self, number: int) -> dict[str, Any] | None:
        """The entry of a shard that is on disk already; None where it is not."""
        path = self.path / SHARDS.format(number)
        return shard_entry(path, self._key) if path.exists() else None

    def held_end(self, number: int, first_text: int) -> int | None:
        """One past the last text of a shard that is on disk already, and begins with this text; None otherwise."""
        entry = self.held(number)
        return entry["end_text"] if entry is not None and entry["first_text"] == first_text else None

    def write(self, number: int, shard: StoreShard) -> None:
        """Writes the shard with this number, in the order of the texts."""
        tensors = {
            "hidden_states": shard.hidden_states.to(self.dtype).contiguous(),
            "text_ids": shard.text_ids.int(),
            "positions": shard.positions.int(),
            "token_ids": shard.token_ids.int(),
        }
        if shard.cls_states is not None:
            tensors["cls_states"] = shard.cls_states.to(self.dtype).contiguous()
        of = {"first_text": shard.first_text, "end_text": shard.end_text, "full_texts": shard.full_texts}
        # One entry: safetensors writes several in an order of chance, and the same states should be the same bytes.
        metadata = {_OF: json.dumps({"store": self._key, **of})}
        save_tensors(self.path / SHARDS.format(number), tensors, metadata)

    def finish(self) -> None:
        """Lists the shards of all processes in the manifest, once the last has written its own.

        Raises:
            ValueError: one is missing.
        """
        processes().wait_for_everyone()
        if processes().is_main_process:
            entries: list[dict[str, Any]] = []
            end = 0
            while end < self.manifest["num_texts"]:
                entry = self.held(len(entries))
                if entry is None or entry["first_text"] != end:
                    raise ValueError(
                        f"{self.path / SHARDS.format(len(entries))} is not there, or not of these texts: the folder "
                        "has to be one that all processes share, and that nothing else writes to"
                    )
                entries.append(entry)
                end = entry["end_text"]
            tokens = sum(entry["tokens"] for entry in entries)
            shape = [tokens, self.manifest["shape"][1]]
            write_json(self.path / MANIFEST, {**self.manifest, "shape": shape, "shards": entries, "complete": True})
        processes().wait_for_everyone()


def shard_entry(path: Path, key: str) -> dict[str, Any] | None:
    """What the manifest says of a shard; None where the file is not of the store with this key, or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            of = json.loads((file.metadata() or {}).get(_OF, "{}"))
            if of.get("store") != key:
                return None
            tokens = file.get_slice("hidden_states").get_shape()[0]
    except SafetensorError:
        return None
    return {
        "file": path.name,
        "first_text": of["first_text"],
        "end_text": of["end_text"],
        "tokens": tokens,
        "full_texts": of["full_texts"],
    }


def _check_same(path: Path, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if held[key] != value:
            raise ValueError(
                f"the folder {path} already holds a store with other {_describe(key)} "
                f"({_difference(held[key], value)}): choose another folder, or overwrite=True"
            )


def _describe(key: str) -> str:
    return {"spec": "backbone or settings", "text_fingerprint": "texts", "num_texts": "texts"}.get(key, key)


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        return "; ".join(f"{key}: {old.get(key)!r} there, {new[key]!r} now" for key in new if old.get(key) != new[key])
    return f"{old!r} there, {new!r} now"
