"""The page of a run, made from a synthetic run folder that says of itself that it is synthetic."""

import html.parser
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from moe_jax import analysis
from moe_jax.report import pictures, search_stage, write_report
from moe_jax.report.contents import read_contents, search_curves
from moe_jax.report.page import interval, number, table
from moe_jax.runs import MetricsWriter, write_json

DOMAINS = ("speeches", "novel", "mathematics", "code")
SPLITS = {"train": 900_000, "search": 60_000, "selection": 60_000, "test": 90_000}
SECTIONS = ["What came out", "Data", "Model and training", "Routing", "Evolution", "Healing", "Reproducibility"]
PICTURES = [
    "front",
    "heal",
    "hypervolume",
    "information",
    "load",
    "margins",
    "masks",
    "methods",
    "search_curves",
    "specialisation",
    "training",
]
VOID = {"meta", "br", "hr", "img", "link", "input"}


def synthetic_trace(seed=0, num_layers=4, num_documents=40, length=120, num_experts=16):
    """Routing drawn from a known model: bytes matter in all layers, domains increasingly, one expert is dead."""
    rng = np.random.default_rng(seed)
    num_tokens = num_documents * length
    document = np.repeat(np.arange(num_documents), length)
    domain = document % 4
    token_ids = np.where(rng.random(num_tokens) < 0.8, rng.integers(0, 60, num_tokens), 60 + domain)
    logits = rng.gumbel(size=(num_layers, num_tokens, num_experts))
    logits += 0.9 * rng.normal(size=(num_layers, 64, num_experts))[:, token_ids]
    effect = np.linspace(0, 1.2, num_layers)[:, None, None]
    logits += effect * rng.normal(size=(num_layers, 4, num_experts))[:, domain]
    logits[-1, :, 11] -= 50
    logits = logits.astype(np.float32)
    return analysis.RoutingTrace(
        expert_ids=np.argsort(-logits, -1)[..., :2].astype(np.int16),
        gates=np.full((num_layers, num_tokens, 2), 0.5, np.float32),
        entropy=np.asarray(analysis.router_entropy(logits)),
        margin=np.asarray(analysis.boundary_margin(logits, 2)),
        top_probability=np.asarray(analysis.top_probability(logits)),
        token_ids=token_ids.astype(np.int32),
        token_mask=np.ones(num_tokens, bool),
        position=(np.arange(num_tokens) % length).astype(np.int32),
        domain=domain.astype(np.int32),
        document=document.astype(np.int32),
        num_experts=num_experts,
        domain_names=DOMAINS,
    )


def synthetic_method(name, kind, kl, evaluations, num_seeds, **more):
    rng = np.random.default_rng(len(name))
    seeds = list(range(num_seeds))
    kls = (kl * (1 + 0.06 * rng.normal(size=num_seeds))).tolist()
    return {
        "name": name,
        "kind": kind,
        "genome": "keep-mask",
        "seeds": seeds,
        "evaluations": evaluations,
        "seconds": evaluations / 55,
        "search_kl": kls,
        "selection_kl": [k * 1.05 for k in kls],
        "test_bpb": [1.95 + 1.1 * k for k in kls],
        "test_bpb_interval": [1.92 + kl, 1.99 + kl],
        "delta_vs_full": {"estimate": 1.1 * kl, "interval": [1.1 * kl - 0.008, 1.1 * kl + 0.008]},
        "active_flops_per_token": 1.2e6,
        "max_over_mean_load": 2.3,
        **more,
    }


def synthetic_data():
    return {
        "description": ["Split by document before anything else."],
        "bytes": {split: dict.fromkeys(DOMAINS, size // 4) for split, size in SPLITS.items()},
        "documents": {split: dict.fromkeys(DOMAINS, size // 6000) for split, size in SPLITS.items()},
        "digests": dict.fromkeys(SPLITS, "0" * 64),
        "sources": [
            {"domain": name, "title": f"Synthetic {name}", "origin": "drawn at random", "licence": "CC0-1.0"}
            for name in DOMAINS
        ],
    }


def synthetic_search():
    comparison = {"against": "random search", "p_value": 0.0625, "win_rate": 1.0}
    better = comparison | {"difference": -0.04, "interval": [-0.05, -0.03], "verdict": "better"}
    tie = {
        "against": "local search",
        "difference": -0.002,
        "interval": [-0.011, 0.007],
        "p_value": 0.6,
        "win_rate": 0.6,
        "verdict": "tie",
    }
    rng = np.random.default_rng(1)
    flops = np.sort(rng.uniform(0.6, 1.9, 24))
    front = np.stack([0.35 * (1.9 - flops) ** 2 + 0.02, flops, 1.5 + rng.random(24)], -1)
    return {
        "description": ["Same repair, initialisation and search split for every method."],
        "budget": {"evaluations": 2048, "experts_kept": 32, "seeds": 5},
        "methods": [
            synthetic_method("full model", "reference", 0.0, 0, 1),
            synthetic_method("discrete GA", "evolved", 0.054, 2048, 5, comparisons=[better]),
            synthetic_method("NSGA-II", "evolved", 0.058, 2048, 5, comparisons=[tie]),
            synthetic_method("local search", "baseline", 0.060, 2048, 5),
            synthetic_method("random search", "baseline", 0.110, 2048, 5),
            synthetic_method("greedy removal", "baseline", 0.066, 1552, 1),
            synthetic_method("REAP saliency", "baseline", 0.090, 1, 1),
        ],
        "objectives": ["KL to the full model, nats per byte", "active expert MFLOP per token", "max / mean load"],
        "front": [
            {"method": "NSGA-II", "seed": 0, "points": front[::2].tolist()},
            {"method": "NSGA-II", "seed": 1, "points": front[1::2].tolist()},
            {"method": "random search", "seed": 0, "points": (front[::3] + np.array([0.08, 0.05, 0.3])).tolist()},
        ],
        "full_model": [0.0, 2.0, 1.8],
        "reference_point": [0.7, 2.1, 3.2],
        "hypervolume": [
            {"method": "NSGA-II", "evaluations": 2048, "values": [1.21, 1.24, 1.22, 1.25, 1.2]},
            {"method": "random search", "evaluations": 2048, "values": [0.95, 0.99, 0.93, 1.01, 0.97]},
        ],
    }


def synthetic_heal():
    return [
        {
            "name": name,
            "steps": 60,
            "one_shot_bpb": one_shot,
            "one_shot_interval": [one_shot - 0.02, one_shot + 0.02],
            "healed_bpb": healed,
            "healed_interval": [healed - 0.02, healed + 0.02],
        }
        for name, one_shot, healed in (
            ("full model", 1.95, 1.93),
            ("discrete GA", 2.01, 1.95),
            ("REAP", 2.05, 1.96),
        )
    ]


def synthetic_results():
    return {
        "title": "SYNTHETIC RUN: numbers drawn at random to test the report",
        "summary": ["Nothing on this page was measured <b>&amp; the title says so</b>."],
        "data": synthetic_data(),
        "model": {
            "parameters_total": 1_084_672,
            "parameters_active": 298_112,
            "num_layers": 4,
            "num_experts": 16,
            "num_choices": 2,
            "width": 96,
            "sequence_length": 128,
        },
        "ngram": {
            "order": 5,
            "bits_per_byte": {"all": 2.61} | dict.fromkeys(DOMAINS, 2.6),
            "selection_bits_per_byte": 2.55,
        },
        "model_bits_per_byte": {
            split: {"all": value, **dict.fromkeys(DOMAINS, value), "interval": [value - 0.03, value + 0.03]}
            for split, value in (("train", 1.81), ("selection", 1.94), ("test", 1.95))
        },
        "search": synthetic_search(),
        "heal": synthetic_heal(),
        "timing": {"data": 4.1, "training": 160.2, "search": 92.7, "report": 6.3},
    }


def write_synthetic_run(path):
    """Writes a whole run folder, as an experiment would."""
    rng = np.random.default_rng(2)
    write_json(path / "config.json", {"seed": 0, "evolution": {"generations": 40, "population": 64}})
    write_json(
        path / "environment.json",
        {
            "command": "python -m experiments.synthetic --x='<y>'",
            "seed": 0,
            "python": "3.11.2",
            "backend": "cpu",
            "devices": ["cpu"],
            "packages": {"jax": "0.10.2"},
            "git": {"commit": "0" * 40, "is_dirty": False},
        },
    )
    write_json(path / "status.json", {"status": "finished", "stage": "report", "step": 0, "error": None})
    write_json(path / "results.json", synthetic_results())
    writer = MetricsWriter(path, "train")
    for step in range(1, 601):
        loss = 1.3 + 2.2 * np.exp(-step / 90) + 0.6 * np.exp(-step / 400) + 0.04 * rng.normal()
        writer.append(step, {"loss": loss})
    writer.flush()
    writer = MetricsWriter(path, "evaluate")
    for step in range(50, 601, 50):
        writer.append(step, {"bits_per_byte": 1.9 + 3.1 * np.exp(-step / 90) + 0.8 * np.exp(-step / 400)})
    writer.flush()
    for method, floor in (("discrete GA", 0.05), ("NSGA-II", 0.056), ("local search", 0.058), ("random search", 0.11)):
        for seed in range(3):
            writer = MetricsWriter(path, search_stage(method, seed))
            for step in range(32):
                best = floor * (1 + 0.05 * seed) + 0.25 * np.exp(-step / 6)
                writer.append(step, {"evaluations": 64.0 * (step + 1), "best": best})
            writer.flush()
    analysis.save_trace(path / "traces" / "routing.npz", synthetic_trace())
    np.savez(
        path / "traces" / "topologies.npz",
        names=np.array(["discrete GA", "NSGA-II", "REAP saliency"]),
        keep=rng.random((3, 4, 16)) < 0.5,
        num_choices=np.full((3, 4), 2),
    )


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "synthetic"
    path.mkdir()
    write_synthetic_run(path)
    write_report(path)
    return path


class Balanced(html.parser.HTMLParser):
    """Collects headings, ids and references, and fails on a tag that closes nothing."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.headings = [], [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += [attributes[key] for key in ("src", "href") if key in attributes]
        self.references += re.findall(r"url\(([^)]*)\)", " ".join(v or "" for v in attributes.values()))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def parse(path):
    parser = Balanced()
    parser.feed(path.read_text())
    parser.close()
    assert parser.open == []
    return parser


def test_page_has_every_section_and_picture_and_parses(run_path):
    page = (run_path / "report.html").read_text()
    assert parse(run_path / "report.html").headings == SECTIONS
    assert "Not in this run" not in page
    assert sorted(p.stem for p in (run_path / "pictures").iterdir()) == PICTURES
    assert page.count("<svg") == len(PICTURES)


def test_page_fetches_nothing_and_its_references_resolve(run_path):
    parser = parse(run_path / "report.html")
    assert parser.references
    inline = re.compile("data:image/png;base64,")
    references = [reference for reference in parser.references if not inline.match(reference)]
    assert all(reference.startswith("#") and reference[1:] in parser.ids for reference in references)
    assert len(parser.ids) == len(set(parser.ids))
    assert not re.search(r"https?:|<script|@import|<link", (run_path / "report.html").read_text())


def test_text_of_a_run_is_escaped(run_path):
    page = (run_path / "report.html").read_text()
    assert "&lt;b&gt;&amp;amp; the title says so&lt;/b&gt;" in page
    assert "--x=&#x27;&lt;y&gt;&#x27;" in page


def test_page_says_what_the_results_say(run_path):
    page = (run_path / "report.html").read_text()
    assert "discrete GA is better than random search: difference −0.04 [−0.05, −0.03]" in page
    assert "NSGA-II is a tie with local search: difference −0.002 [−0.011, 0.007]" in page
    assert "2,048 for every method except greedy removal (1,552), REAP saliency (1)" in page
    assert "Dead: layer 3 expert 11." in page
    assert '<td class="words better">better</td>' in page
    assert "1.95" in page
    assert "1,084,672" in page


def test_pictures_are_xml_and_follow_the_theme(run_path):
    for path in (run_path / "pictures").iterdir():
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    figures = re.findall(r"<figure>.*?</figure>", (run_path / "report.html").read_text(), re.DOTALL)
    assert all("var(--muted)" in figure for figure in figures)
    assert all(re.search(r'aria-label="[^"]{20,}"', figure) for figure in figures)


def test_report_is_the_same_when_made_again(run_path):
    before = (run_path / "report.html").read_bytes()
    write_report(run_path)
    assert (run_path / "report.html").read_bytes() == before


def test_stored_routing_summary_is_preferred_over_the_trace(tmp_path):
    trace = synthetic_trace(num_documents=8, length=20)
    analysis.save_trace(tmp_path / "traces" / "routing.npz", trace)
    summary = analysis.summarise_routing(trace, num_shuffles=5)
    write_json(tmp_path / "results.json", {"routing": summary | {"num_tokens": 123_456}})
    assert "123,456 tokens" in write_report(tmp_path).read_text()


def test_an_empty_folder_gives_a_page_that_names_what_is_missing(tmp_path):
    page = write_report(tmp_path)
    assert parse(page).headings == SECTIONS
    assert page.read_text().count("Not in this run") >= 6
    assert "not finished: unknown" in page.read_text()


def test_a_failed_run_says_so(tmp_path):
    status = {"status": "failed", "stage": "search", "error": "NaN at step 3"}
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert "not finished: failed in stage search. Error: NaN at step 3." in write_report(tmp_path).read_text()


def test_undefined_numbers_are_dashes(tmp_path):
    methods = [{"name": "x", "kind": "evolved", "seeds": [0, 1], "test_bpb": [float("nan"), None], "evaluations": 7}]
    write_json(
        tmp_path / "results.json", {"search": {"methods": methods}, "model_bits_per_byte": {"test": {"all": None}}}
    )
    page = write_report(tmp_path).read_text()
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert "<td>–</td>" in page


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no run folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "traces").mkdir()
    np.savez(tmp_path / "traces" / "topologies.npz", names=np.array(["a"]))
    with pytest.raises(ValueError, match=r"topologies.npz holds no topologies: it lacks keep, num_choices"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results.json is not valid JSON"):
        write_report(tmp_path)


def test_search_curves_align_seeds_that_reported_at_different_evaluations(tmp_path):
    for seed, evaluations in ((0, [10, 20, 30]), (1, [15, 30])):
        writer = MetricsWriter(tmp_path, search_stage("Discrete GA, masks", seed))
        for step, count in enumerate(evaluations):
            writer.append(step, {"evaluations": count, "best": 1.0 / count})
        writer.flush()
    write_json(tmp_path / "results.json", {"search": {"methods": [{"name": "Discrete GA, masks"}]}})
    grid, best = search_curves(read_contents(tmp_path))["Discrete GA, masks"]
    # from 15 on both have begun; each seed keeps its last report until the next
    assert grid.tolist() == [15, 20, 30]
    np.testing.assert_allclose(best, [[1 / 10, 1 / 20, 1 / 30], [1 / 15, 1 / 15, 1 / 30]])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (-2.5, "−2.5"),
        (True, "True"),
        (123456.7, "123,457"),
        ("<a>", "<a>"),
    ],
)
def test_numbers_are_written_for_people(value, expected):
    assert number(value) == expected


def test_intervals_and_tables():
    assert interval([1.0, 2.0]) == "[1, 2]"
    assert interval([None, 2.0]) == interval(None) == ""
    markup = table(["a", "unused", "b"], [["<x>", None, "tie"]])
    assert "unused" not in markup
    assert "<td>&lt;x&gt;</td><td>tie</td>" in markup


def test_pictures_of_extremes_draw():
    one_expert = pictures.plot_load([[1.0]], band=(1.0, 1.0))
    undefined = pictures.plot_specialisation([[[np.nan, 0.0], [1.0, 1.0]]], ["empty", "full"], num_choices=1)
    many = pictures.plot_masks(["one"], np.ones((1, 2, 64), bool), np.ones((1, 2), int))
    no_interval = pictures.plot_comparison(["a"], [1.0], [np.nan], [np.nan], xlabel="x")
    for figure in (one_expert, undefined, many, no_interval):
        figure.draw_without_rendering()
        assert figure.axes
