import subprocess
import sys

import selfreg


def test_every_public_name_is_there() -> None:
    for name in selfreg.__all__:
        assert getattr(selfreg, name) is not None
    assert set(selfreg.__all__) <= set(dir(selfreg))


def test_import_needs_nothing_optional() -> None:
    code = (
        "import sys\n"
        "for name in ('plotly', 'fairlearn', 'concept_erasure', 'peft', 'gguf', 'datasets', 'evaluate', 'typer',"
        " 'pydantic', 'pyarrow', 'jinja2'):\n"
        "    sys.modules[name] = None\n"
        "import selfreg\n"
        "from selfreg import SAEForFeatureExtraction, RegularizedSequenceClassifier, HiddenStateExtractor\n"
        "from transformers import AutoConfig\n"
        "AutoConfig.for_model('sparse_autoencoder')\n"
        "AutoConfig.for_model('regularized_sequence_classifier')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
