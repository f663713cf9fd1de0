"""Writes `fixtures/`: SAEs made by other libraries' own code, with the features and reconstructions that they give.

    python -m venv peers && peers/bin/pip install torch==2.13.0 sae-lens eai-sparsify sentence-transformers nnsight
    peers/bin/pip install --no-deps dictionary-learning
    peers/bin/python tests/sae/interop/make_fixtures.py

A second environment, since dictionary-learning asks for torchvision and with it for another torch. A file
`<case>/expected.safetensors` holds states, features and reconstruction; the state dicts of formats that are pickles
lie in `<case>/state.safetensors`, and the tests write the pickle.
"""

import itertools
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH, FEATURES, STATES, K = 6, 20, 8, 3
HERE = Path(__file__).parent / "fixtures"


def main() -> None:
    warnings.filterwarnings("ignore")
    shutil.rmtree(HERE, ignore_errors=True)
    for make in (saelens, saelens_training, sparsify, sentence_transformers, dictionary_learning):
        torch.manual_seed(0)
        make()
    size = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    sys.stdout.write(f"{len(list(HERE.iterdir()))} cases, {size / 1024:.0f} kB\n")


def states() -> Tensor:
    return torch.randn(STATES, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 + 1


def randomized(module: Any) -> Any:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.4 if parameter.ndim == 2 else 0.2))
            if "threshold" in name:
                parameter.copy_(torch.rand_like(parameter) * 0.8)
    return module


def expect(case: str, features: Tensor, reconstruction: Tensor) -> None:
    tensors = {"states": states(), "features": features, "reconstruction": reconstruction}
    save_file(
        {name: t.detach().float().contiguous() for name, t in tensors.items()}, HERE / case / "expected.safetensors"
    )


def saelens() -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY

    options: list[dict[str, Any]] = [
        {},
        {"apply_b_dec_to_input": False},
        {"normalize_activations": "layer_norm"},
        {"normalize_activations": "constant_norm_rescale"},
        {"rescale_acts_by_decoder_norm": True},
    ]
    for architecture, option in itertools.product(("standard", "gated", "topk", "jumprelu"), options):
        if "rescale_acts_by_decoder_norm" in option and architecture != "topk":
            continue
        cls, config_cls = SAE_CLASS_REGISTRY[architecture]
        extra = {"k": K} if architecture == "topk" else {}
        config = config_cls(d_in=WIDTH, d_sae=FEATURES, **option, **extra)
        config.metadata.model_name, config.metadata.hook_name = "openai-community/gpt2", "blocks.3.hook_resid_post"
        sae = randomized(cls(config))
        case = "-".join(["saelens", architecture, *(f"{value}".lower() for value in option.values())])
        sae.save_model(HERE / case)
        features = sae.encode(states())
        expect(case, features, sae.decode(features))


def saelens_training() -> None:
    """Architectures that SAELens saves as another one for inference, and as themselves in the middle of training."""
    from sae_lens import SAE
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    extras: dict[str, dict[str, Any]] = {
        "topk": {"k": K},
        "batchtopk": {"k": K},
        "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [5, 10, FEATURES]},
        "jumprelu": {},
    }
    for architecture, extra in extras.items():
        cls, config_cls = SAE_TRAINING_CLASS_REGISTRY[architecture]
        sae = randomized(cls(config_cls(d_in=WIDTH, d_sae=FEATURES, **extra)))
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = torch.tensor(1.1, dtype=torch.double)
        inference, training = f"saelens-inference-{architecture}", f"saelens-training-{architecture}"
        sae.save_model(HERE / training)
        sae.save_inference_model(HERE / inference)
        loaded = SAE.load_from_disk(HERE / inference)
        features = loaded.encode(states())
        for case in (inference, training):
            expect(case, features, loaded.decode(features))


def sparsify() -> None:
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    sae = randomized(SparseCoder(WIDTH, SparseCoderConfig(num_latents=FEATURES, k=K)))
    case = "sparsify"
    sae.save_to_disk(HERE / case)
    found = sae.encode(states())
    features = torch.zeros(STATES, FEATURES).scatter(1, found.top_indices, found.top_acts)
    expect(case, features, sae(states()).sae_out)


def sentence_transformers() -> None:
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    for normalize in (False, True):
        sae = randomized(SparseAutoEncoder(WIDTH, FEATURES, k=K, k_aux=4, normalize=normalize)).eval()
        case = f"sentence-transformers-{'normalize' if normalize else 'plain'}"
        (HERE / case).mkdir(parents=True)
        sae.save(str(HERE / case))
        with torch.no_grad():
            out = sae({"sentence_embedding": states()})
        expect(case, out["sentence_embedding"], out["decoded_embedding_k"])


def dictionary_learning() -> None:
    from dictionary_learning import dictionary
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made: list[tuple[str, nn.Module]] = [
        ("", dictionary.AutoEncoder(WIDTH, FEATURES)),
        ("", dictionary.AutoEncoderNew(WIDTH, FEATURES)),
        ("", dictionary.GatedAutoEncoder(WIDTH, FEATURES)),
        ("", dictionary.JumpReluAutoEncoder(WIDTH, FEATURES)),
        ("", AutoEncoderTopK(WIDTH, FEATURES, K)),
        ("", BatchTopKSAE(WIDTH, FEATURES, K)),
        ("-untrained", BatchTopKSAE(WIDTH, FEATURES, K)),
        ("", MatryoshkaBatchTopKSAE(WIDTH, FEATURES, K, [4, 6, 10])),
    ]
    for suffix, module in made:
        name = type(module).__name__
        sae: Any = randomized(module)
        if "BatchTopK" in name and not suffix:
            sae.threshold.fill_(0.9)
        case = HERE / f"dictionary_learning-{name}{suffix}"
        case.mkdir(parents=True)
        save_file(
            {key: value.contiguous().clone() for key, value in sae.state_dict().items()}, case / "state.safetensors"
        )
        trainer = {
            "dict_class": name,
            "lm_name": "EleutherAI/pythia-70m",
            "layer": 3,
            "submodule_name": "resid_post_layer_3",
        }
        (case / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
        features = sae.encode(states())
        expect(case.name, features, sae.decode(features))


if __name__ == "__main__":
    main()
