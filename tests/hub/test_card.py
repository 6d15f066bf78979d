"""The card: what it shows, that it shows nothing else, and text that would break YAML or Markdown."""

import re
import shlex
from dataclasses import asdict, replace

import pytest
import yaml
from huggingface_hub import ModelCard as HubCard
from huggingface_hub import ModelCardData, parse_eval_result_entries
from markdown_it import MarkdownIt

from repvgg_hf import ClusterConfig, RepVGGConfig, RepVGGForImageClassification
from repvgg_hf.analysis import kernel_report
from repvgg_hf.hub import About, EngineResult, Example, KernelResult, LatencyResult, ModelCard
from repvgg_hf.hub.branch_kernels import dense_branch_report
from repvgg_hf.hub.results import build


@pytest.fixture
def make_card(tiny_config, results):
    """`make_card(...)`: of a 4 bit model, with other fields than the usual ones."""

    def make(bits=4, **fields) -> ModelCard:
        config = tiny_config(deploy=True).to_dict()
        if bits is not None:
            config["quantization_config"] = ClusterConfig(bits=bits).to_dict()
        defaults = {"repo_id": "org/tiny-w4", "config": config, "image_size": 8, "license": "mit"}
        return ModelCard(**(defaults | {"results": results, "published": "cluster-w4"} | fields))

    return make


def tables(text: str) -> list[list[list[str]]]:
    """Cells of every table, by a Markdown parser."""
    parts = re.findall(r"<table>(.*?)</table>", html(text), re.DOTALL)
    rows = [re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL) for part in parts]
    return [[re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in part] for part in rows]


def table_with(text: str, *headings: str) -> list[list[str]]:
    """The first table that has these headings."""
    return next(found for found in tables(text) if set(headings) <= set(found[0]))


def html(text: str) -> str:
    """The card below its YAML block, rendered with raw HTML allowed, as an attacker would wish."""
    return MarkdownIt("commonmark").enable("table").render(text.split("\n---\n", 1)[1])


def test_figures_are_those_of_the_results(make_card):
    headings, *rows = table_with(str(make_card()), "weights")
    assert headings[:5] == ["weights", "codebooks", "bits", "top-1", "accuracy drop"]
    assert rows[2] == [
        f"<strong>{entry}</strong>" for entry in
        ("cluster", "per tensor with channel scale", "4", "95.00", "1.50", "99.50", "0.2000", "3,108", "4.40", "1")
    ]  # fmt: skip
    assert table_with(str(make_card()), "cluster") == [
        ["codebooks", "bits", "cluster", "uniform"], ["per tensor", "4", "95.00", "80.25"]
    ]  # fmt: skip


def test_the_top_says_what_was_won_and_lost(make_card, results):
    """Of 342 right of 360 images (95 %), Wilson's interval is 92.2 to 96.8 percent."""
    more = [replace(results.models[2], model="w8", bits=8, top1=96.0, bytes=5000)]
    engines = [
        EngineResult(name, engine, 95.0, 99.0, 98.0, 360, milliseconds=time, device="a processor, 1 thread")
        for name, engine, time in (
            ("float", "ONNX Runtime", 8.4), ("cluster-w4", "ONNX Runtime", 2.0), ("cluster-w4", "OpenVINO", 0.5),
            ("uniform-w4", "ONNX Runtime", 0.1),
        )
    ]  # fmt: skip
    full = replace(results, models=results.models + more, engines=engines)
    text = str(make_card(results=full, links={"w8": "https://hub/w8", "cluster-w4": "https://hub/w4"}))
    line = "**96.5 → 95.0 % top-1, 3.1 x smaller (3.11 kB), 4.2 x faster on ONNX Runtime (a processor, 1 thread)**"
    assert text.split("\n# tiny-w4\n\n")[1].startswith(line)
    rows = table_with(text.replace("\N{NO-BREAK SPACE}", " "), "size")
    assert [row[0] for row in rows] == ["bits", "float", '<a href="https://hub/w8">8</a>', "<strong>4 (this)</strong>"]
    assert rows[3][1:] == [f"<strong>{entry}</strong>" for entry in ("3.11 kB", "95.0 ± 2.3", "1.5")]
    alone = str(make_card(results=replace(results, models=results.models[2:])))
    assert "**95.0 % top-1, 3.11 kB**" in alone and not [found for found in tables(alone) if "size" in found[0]]


def test_what_the_author_tells(make_card, results):
    about = About("Sorting <b>bottles</b>.", "my photographs", "CC0", "org/base")
    example = Example("plots/tiny-example.png", ["7", "1"], [0.9876, 0.01])
    text = str(make_card(about=about, example=example))
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "org/base" and "<b>" not in html(text)
    for said in ("## Intended use", "Training data: my photographs", "License of the training data: CC0"):
        assert said in text
    assert "![7](plots/tiny-example.png)" in text and "*The model says: 7 98.8 %, 1 1.0 %*" in text
    silent = str(make_card())
    assert not [word for word in ("Intended use", "Training data", "The model says", "base_model") if word in silent]


@pytest.mark.parametrize(("count", "folded"), [(10, False), (13, True)])
def test_names_of_classes(make_card, tiny_config, count, folded):
    names = [f"class_{index} <i>" for index in range(count)]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config = tiny_config(num_labels=count, **labels).to_dict()
    text = str(make_card(bits=None, config=config, results=None, published=None))
    assert (f"<summary>The {count} classes</summary>" in text) == folded and "class\\_9 \\<i\\>" in text
    assert "Classes:" not in str(make_card())  # LABEL_0 is no name


def test_methods_side_by_side(make_card, results):
    """Only what is alike but for the method and its channel scale; with and without one, the more accurate."""
    uniform, cluster = results.models[1:]
    more = [
        replace(cluster, model="no scale", channel_scale=False, top1=90.0),
        replace(cluster, model="worse scale", granularity="per_channel", top1=70.0),
        replace(cluster, model="better without", granularity="per_channel", channel_scale=False, top1=71.0),
        replace(uniform, model="per channel", granularity="per_channel", top1=69.0),
        replace(uniform, model="8 bits", bits=8, top1=96.0),
        replace(uniform, model="QAT", training="QAT", top1=94.0),
    ]
    (_, *rows) = table_with(str(make_card(results=replace(results, models=results.models + more))), "cluster")
    assert rows == [["per tensor", "4", "95.00", "80.25"], ["per channel", "4", "71.00", "69.00"]]


def test_nothing_without_a_measurement(make_card, results):
    text = str(make_card(results=None, published=None))
    assert "## Results" not in text and "model-index" not in text and "No accuracy was measured" in text
    sparse = replace(results, models=[replace(results.models[2], top5=None, loss=None)])
    headings = table_with(str(make_card(results=sparse)), "weights")[0]
    assert not {"top-5", "cross-entropy", "accuracy drop", "found by"} & set(headings)
    for title in ("Latency", "Outliers", "side by side", "How it was made"):
        assert title not in str(make_card(results=sparse))


def test_long_commands_are_folded_to_the_same_command(make_card, results):
    command = "python recipes/train.py " + " ".join(f"--option_{index} {index} x" for index in range(20))
    text = str(make_card(results=replace(results, commands=[command])))
    block = re.search(r"```bash\n(.*?)\n```", text, re.DOTALL)[1]
    joined = block.replace("\\\n", "")  # as a shell reads it
    assert shlex.split(joined) == shlex.split(command) and max(map(len, block.splitlines())) < 100


def test_seeds_are_averaged(make_card, results):
    """95 and 94 with seed 0 and 2: mean 94.5, standard deviation sqrt(0.5)."""
    more = [replace(results.models[0], seed=2, top1=95.5), replace(results.models[2], seed=2, top1=94.0)]
    card = make_card(results=replace(results, models=results.models + more))
    row = [re.sub("<.*?>", "", entry) for entry in table_with(str(card), "weights")[3]]
    assert row[3] == "94.50 ± 0.71" and row[4] == "1.50 ± 0.00" and row[-1] == "2"
    assert "spread between seeds is not known" in str(make_card()) and "spread between" not in str(card)


def test_parameters_and_macs(make_card):
    """Of RepVGG-A0 as published (arXiv 2101.03697, table 4: 9.1 and 8.3 M, 1.4 G multiply-accumulates)."""
    card = make_card(config=RepVGGConfig.from_variant("a0", num_labels=1000).to_dict(), image_size=224, results=None)
    rows = {row[0]: row[1:] for row in tables(str(card))[0]}
    assert rows["parameters"] == ["9,108,968", "8,309,384"]
    assert rows["multiply-accumulates"][1] == "1.361 G"
    model = RepVGGForImageClassification(card.model_config)
    assert model.num_parameters() == 9_108_968


def test_kernels_before_and_after_fusing(make_card, results, tiny_config):
    """A large identity shows in the fused kernel and not in the dense branch."""
    model = RepVGGForImageClassification(tiny_config(oabn=False))
    for name, parameter in model.named_parameters():
        if "identity.norm.weight" in name:
            parameter.data.fill_(30.0)
    before, after = dense_branch_report(model), [entry for entry in kernel_report(model) if len(entry["shape"]) == 4]
    assert [entry["name"] for entry in before] == [entry["name"] for entry in after]
    kernels = {"kernels_before": before, "kernels_after": after}
    kernels = {name: [KernelResult(**entry) for entry in entries] for name, entries in kernels.items()}
    table = table_with(str(make_card(results=replace(results, **kernels))), "kernels")
    largest = [float(row[2]) for row in table[1:]]
    assert largest[0] < 10 < 20 < largest[1]
    with pytest.raises(ValueError, match="has no branches: give the checkpoint that was trained"):
        dense_branch_report(model.reparameterize())


def test_model_index_has_a_line_for_each_bit_width(make_card, results, tiny_config):
    hub_results = replace(results, dataset=replace(results.dataset, hub_id="org/digits", revision="1" * 40))
    of_five = HubCard(str(make_card(results=hub_results))).data
    assert {entry.metric_args["top"] for entry in of_five.eval_results} == {1}  # the first five of five say nothing
    ten = tiny_config(deploy=True, num_labels=10).to_dict() | {"quantization_config": ClusterConfig(bits=4).to_dict()}
    card = make_card(results=hub_results, config=ten)
    data = HubCard(str(card)).data  # the Hub client's own reader
    entries = data.eval_results
    assert len(entries) == 4 and len({entry.metric_name for entry in entries}) == 4
    assert {entry.metric_args["bits"] for entry in entries} == {4, 32}  # uniform is another way, on the card alone
    assert entries[0].metric_config == "cluster-w4" and entries[0].metric_value == 95.0
    assert data.license == "mit" and data.datasets == ["org/digits"] and "4-bit" in data.tags
    (entry,) = parse_eval_result_entries(yaml.safe_load(card.eval_results_yaml()))
    assert (entry.dataset_id, entry.value, entry.dataset_revision) == ("org/digits", 95.0, "1" * 40)
    assert make_card().eval_results_yaml() is None  # the dataset is not on the Hub


NASTY = [
    'a: b "c" \'d\'', "---", "line\n---\nkey: value", "- item # no comment", "{a: [b", "*ref &anchor !tag",
    "ümläut 数字 🦜", "null", "1e3", "| a | b |", "<script>alert(1)</script>", "%percent", "@at `tick`", "[link](http://x)",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
def test_text_that_breaks_yaml_or_markdown(make_card, results, text):
    dataset = replace(results.dataset, name=text, hub_id="org/digits")
    models = [replace(model, training=text) for model in results.models]
    card = make_card(results=replace(results, dataset=dataset, models=models, description=text, commands=[text]))
    written = str(card)
    front, body = re.match(r"---\n(.*?)\n---\n(.*)", written, re.DOTALL).groups()
    index = yaml.safe_load(front)["model-index"][0]["results"][0]
    assert index["dataset"]["name"] == text
    assert ModelCardData(**yaml.safe_load(front)).eval_results[0].metric_value == 95.0
    assert [len(row) for row in table_with(written, "weights")] == [11] * 4
    assert "<script>" not in html(written) and "<a " not in html(written)
    assert html(written).count("<h2>") == 6 and body.count("\n## ") == 6
    assert parse_eval_result_entries(yaml.safe_load(card.eval_results_yaml()))[0].dataset_id == "org/digits"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"published": "w4"}, "card.published is 'w4', but results.models has only float, uniform-w4, cluster-w4"),
        ({"published": None}, "card.published is None"),
        ({"repo_id": "tiny"}, "repo_id must be 'namespace/name'"),
        ({"image_size": "8"}, "card.image_size must be int"),
        ({"license": "a\x07"}, "card.license has the character"),
    ],
)
def test_bad_fields(make_card, fields, message):
    with pytest.raises(ValueError, match=message):
        make_card(**fields)


def test_json_round_trip(make_card, results, tmp_path):
    latency = LatencyResult("ours", "PyTorch", "CPU", "batch 1", 1.234)
    card = make_card(results=replace(results, latency=[latency]), revision="w4")
    card.to_json(tmp_path / "card.json")
    again = ModelCard.from_json(tmp_path / "card.json")
    assert str(again) == str(card) and "1.23" in str(card) and 'revision="w4"' in str(card)
    with pytest.raises(ValueError, match="card has an unknown field 'x'"):
        build(ModelCard, asdict(card) | {"x": 1}, "card")


def test_results_type(make_card):
    with pytest.raises(ValueError, match="card.results must be Results, got"):
        make_card(results={"models": []})
