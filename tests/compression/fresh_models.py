"""What the tests of other networks run in a process of its own, which has imported nothing but the package.

python fresh_models.py OUTPUT FAMILY=FOLDER ...

Loads each folder with the family's Auto class, saves what the models put out, and saves each again beside its folder.
"""

import sys

import repvgg_hf  # noqa: F401  all that a user imports besides Transformers


def main() -> None:
    output, *arguments = sys.argv[1:]
    assert "transformers.quantizers.auto" not in sys.modules  # the method gets known when this is imported
    import torch
    from tiny_models import load, logits

    torch.set_num_threads(1)
    found = {}
    for argument in arguments:
        family, _, folder = argument.partition("=")
        model = load(family, folder)
        found[folder] = logits(model)
        model.save_pretrained(f"{folder}-again", max_shard_size="4KB" if folder.endswith("sharded") else "1GB")
    assert "repvgg_hf.compression" not in sys.modules  # loading needs no more than the runtime
    torch.save(found, output)


if __name__ == "__main__":
    main()
