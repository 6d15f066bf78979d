"""What the test of fresh processes runs: loads checkpoints in processes that have imported nothing but the package.

python fresh_process.py INPUTS OUTPUTS ENTRY_POINT=FOLDER ...

Each of the last is loaded by a process of its own; what comes out of the model is in the file of its number. Importing
takes seconds, so that these are copies (forks) of one process that has imported the package and what the entry points
themselves are, and has neither loaded a model nor run a tensor.
"""

import importlib
import os
import sys
import traceback

import repvgg_hf  # noqa: F401  all that a user imports besides Transformers

# what of Transformers the entry points import: once, as it takes seconds
TRANSFORMERS = [
    "modeling_utils",
    "trainer_utils",
    "pipelines.image_classification",
    "models.auto.image_processing_auto",
]
TRANSFORMERS += ["models.auto.modeling_auto", "models.bit.image_processing_bit", "models.bit.image_processing_pil_bit"]


def auto_model(folder: str, inputs: dict) -> dict:
    from transformers import AutoModel

    return {"features": AutoModel.from_pretrained(folder)(inputs["pixel_values"]).last_hidden_state}


def auto_classifier(folder: str, inputs: dict) -> dict:
    from transformers import AutoModelForImageClassification

    return {"logits": AutoModelForImageClassification.from_pretrained(folder)(inputs["pixel_values"]).logits}


def auto_backbone(folder: str, inputs: dict) -> dict:
    from huggingface_hub import HfApi
    from transformers import AutoBackbone

    HfApi.repo_exists = lambda self, repo_id: True  # AutoBackbone asks the Hub about a folder, too
    return {"features": AutoBackbone.from_pretrained(folder, out_indices=[-1])(inputs["pixel_values"]).feature_maps[0]}


def pipeline(folder: str, inputs: dict) -> dict:
    import torch
    from PIL import Image
    from transformers import pipeline

    predicted = pipeline("image-classification", folder)(Image.fromarray(inputs["picture"].numpy()), top_k=10)
    scores = {entry["label"]: entry["score"] for entry in predicted}
    return {"scores": torch.tensor([scores[str(index)] for index in range(10)])}


def evaluate(folder: str, inputs: dict) -> dict:
    import torch

    from repvgg_hf.recipes.evaluate import main

    return {"loss": torch.tensor(main(["--model_name_or_path", folder])["loss"])}


def load(entry_point: str, folder: str, inputs: str, output: str) -> None:
    """Load one folder and save what comes out of the model; a failure is saved as its traceback."""
    import torch

    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            result = globals()[entry_point](folder, torch.load(inputs))
    except Exception:
        result = {"error": traceback.format_exc()}
    torch.save(result, output)


def main() -> None:
    inputs, outputs, *tasks = sys.argv[1:]
    tasks = [task.split("=", 1) for task in tasks]
    if any(entry_point == "evaluate" for entry_point, _ in tasks):
        import repvgg_hf.recipes.evaluate  # noqa: F401
    else:
        for name in TRANSFORMERS:
            importlib.import_module(f"transformers.{name}")
        assert "repvgg_hf.compression" not in sys.modules and "repvgg_hf.runtime.modeling_repvgg" not in sys.modules
    for number, (entry_point, folder) in enumerate(tasks):
        child = os.fork()
        if child == 0:
            load(entry_point, folder, inputs, os.path.join(outputs, f"{number}.pt"))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
