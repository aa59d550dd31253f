"""Two phases: `train` starts from the adapter of `pretrain`, and only from one of its own shape."""

import shutil
from pathlib import Path

from pipeline.models.manifest import ADAPTER
from tests.conftest import set_params, yaml
from tests.hub import COMMIT
from tests.stages.helpers import call, numbers, table, tensors


def test_train_starts_from_the_first_phases_adapter(project: Path) -> None:
    shutil.copyfile(project / "data" / "formatted" / "train.jsonl", project / "data" / "artificial.jsonl")
    shutil.rmtree(project / "models" / "pretrained", ignore_errors=True)
    about = {"source": "hub", "repo_id": "local/artificial", "revision": COMMIT, "file": "x.parquet"}
    training = yaml.load((project / "params.yaml").read_text())["train"]
    assert call(project, "pretrain", **about, **training | {"max_steps": 2, "warmup_steps": 0}) == ""
    # With a rate of nearly zero, `train` leaves the adapter that it starts from as it is.
    assert call(project, "train", learning_rate=1e-12, max_steps=1, warmup_steps=0) == ""
    first, second = (tensors(project / "models" / name / ADAPTER) for name in ("pretrained", "adapter"))
    assert max(float((second[name] - first[name]).abs().max()) for name in first) < 1e-6
    assert max(float(values.abs().max()) for name, values in second.items() if "lora_B" in name) > 1e-6
    facts = numbers(project / "models" / "adapter" / "training.json")["pretraining"]
    assert (facts["params"]["repo_id"], facts["training_examples"]) == ("local/artificial", 32)
    assert len(table(project / "metrics" / "pretrain_log.csv")) == 2
    set_params(project, "train", r=8)
    assert "train.r must equal pretrain.r" in call(project, "train")
