"""The README.md of a catalogue: what the Hub shows of it, and what tells `datasets` which file holds the rows."""

from pathlib import Path
from typing import TYPE_CHECKING

from selfreg.utils.files import atomic_path
from selfreg.utils.hub import MARK

if TYPE_CHECKING:
    from selfreg.features.catalog import FeatureCatalog


_CARD = """---
library_name: selfreg
tags: [selfreg, sparse-autoencoder, interpretability]
configs:
- config_name: default
  data_files: features.parquet
---
{mark}
# Features of a sparse autoencoder

{num_features:,} latent features of a sparse autoencoder on `{model}`, layer {layer}, from {num_texts:,} texts
({num_tokens:,} tokens): {alive:,} were active, {explained:,} are explained, {judged:,} judged.

A row is a feature: its explanation and scores, the verdict and the votes behind it, how often and how strongly it is
active, the spans of text that activate it most (`spans`), others from each quarter of its activations
(`quantile_spans`, the weakest first), texts in which it is silent though they hold the same words (`near_misses`),
the most similar features (`nearest`) and the tokens that it promotes.

The spans are pieces of the texts that the catalogue was built from, as they were written, by whomever.

```python
from selfreg import FeatureCatalog

catalog = FeatureCatalog.from_pretrained("your-name/features")
# or datasets.load_dataset("your-name/features", split="train")
```
"""


def write_card(folder: Path, catalog: "FeatureCatalog") -> None:
    """Writes README.md, unless there is one that selfreg did not write."""
    path = folder / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf8", errors="replace"):
        return
    text = _CARD.format(
        mark=MARK,
        num_features=len(catalog),
        model=catalog.spec.model,
        layer=catalog.spec.layer,
        num_texts=catalog.info["num_texts"],
        num_tokens=catalog.info["num_tokens"],
        alive=sum(bool(record.spans) for record in catalog),
        explained=sum(record.explained for record in catalog),
        judged=sum(record.verdict is not None for record in catalog),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf8")
