"""One rule for the arguments of every loss: how it is built, how it is called, and what it refuses."""

import inspect

import pytest

import ccl_fast.losses
from benchmarks.pages import family
from ccl_fast.errors import ArgumentError
from ccl_fast.losses import Loss
from tests import ROOT

COMMON = {
    "learnable_temperature": False,
    "normalize": True,
    "reduction": "mean",
    "backend": "auto",
    "process_group": None,
    "exchange": "all-gather",
}
ONE_PROCESS = "process_group exchange"
# By name: the temperature, the options of its own, what it cannot honour; and the arguments of `forward`, those after
# the star by name alone.
SIGNATURES = {
    "AdaMEOWLoss": (0.1, "symmetric weigh_positive", ONE_PROCESS, "queries cluster_ids * weights keys"),
    "BECLRLoss": (
        2.0,
        "negative_weight",
        "reduction process_group exchange",
        "embeddings * predictions targets",
    ),
    "CACRLoss": (
        1.0,
        "t_positive t_negative negatives_of rbf",
        "temperature learnable_temperature backend process_group exchange",
        "embeddings labels",
    ),
    "CCLLoss": (
        0.1,
        "center_weight form center_temperature instance_weight",
        "",
        "embeddings cluster_ids centers * center_temperature",
    ),
    "CMIMLoss": (0.1, "", ONE_PROCESS, "embeddings"),
    "CSGCLLoss": (0.4, "strength_weight", ONE_PROCESS, "queries keys * strength"),
    "CenterNegativesLoss": (0.1, "", "", "embeddings cluster_ids centers"),
    "CodingRateLoss": (
        1.0,
        "eps",
        "temperature learnable_temperature reduction backend exchange",
        "embeddings cluster_ids",
    ),
    "ConRLoss": (
        0.07,
        "window push count_masked",
        "backend process_group exchange",
        "embeddings * targets predictions weights",
    ),
    "DeepClusterV2Loss": (0.1, "", "exchange", "embeddings cluster_ids centers"),
    "FeatureTransformationLoss": (
        0.2,
        "positive_alpha negative_alpha per_dimension",
        ONE_PROCESS,
        "queries keys * negatives generator",
    ),
    "GatedPairLoss": (
        0.1,
        "",
        "normalize backend process_group exchange",
        "embeddings labels * partner_labels gates",
    ),
    "GroCoLoss": (
        1.0,
        "num_negatives steepness",
        "temperature learnable_temperature backend process_group exchange",
        "embeddings",
    ),
    "HardContrastiveLoss": (0.7, "alpha symmetric", ONE_PROCESS, "queries keys * negatives"),
    "InfoNCELoss": (0.1, "symmetric in_batch_negatives", "", "queries keys * negatives"),
    "InterCLRLoss": (
        0.2,
        "inter_weight num_negatives pool margin",
        ONE_PROCESS,
        "queries keys * negatives bank bank_cluster_ids indices generator",
    ),
    "LightGCLLoss": (0.2, "positive_limit", ONE_PROCESS, "queries keys * nodes"),
    "MaxSimLoss": (1.0, "", "backend process_group exchange", "queries keys * query_ids key_ids num_ids"),
    "ListContrastLoss": (0.1, "", "backend process_group exchange", "embeddings * positives negatives"),
    "MCLLoss": (0.1, "symmetric", "", "queries cluster_ids * keys"),
    "MEOWLoss": (0.1, "symmetric weigh_positive", "", "queries cluster_ids * keys"),
    "MLCLoss": (0.1, "eps", "reduction process_group exchange", "embeddings * heads"),
    "MLCDLoss": (
        1 / 32,
        "sample margin margin_form",
        "backend process_group exchange",
        "embeddings cluster_ids prototypes * generator",
    ),
    "MoCHiLoss": (
        0.2,
        "num_hardest num_synthetic num_with_query",
        ONE_PROCESS,
        "queries keys * negatives generator",
    ),
    "PamCLoss": (0.1, "form", "exchange", "queries keys cluster_ids * positives"),
    "NTXentLoss": (0.5, "unassigned", "", "embeddings labels indices_tuple ref_emb ref_labels * negatives"),
    "ProtoGCDLoss": (
        0.1,
        "teacher_temperature hard_share entropy_weight separation_weight supervised_weight",
        "reduction process_group exchange",
        "embeddings prototypes * labels",
    ),
    "PixProLoss": (
        1.0,
        "ratio",
        "temperature learnable_temperature backend process_group exchange",
        "queries keys * boxes key_boxes",
    ),
    "ProtoNCELoss": (0.1, "in_batch_negatives", "", "queries cluster_ids centers * center_temperature keys negatives"),
    "SBCLLoss": (
        0.1,
        "class_weight base_temperature own_views",
        "",
        "embeddings labels cluster_ids * class_temperature",
    ),
    "SCGCLoss": (1.0, "self_term", ONE_PROCESS, "embeddings * influence"),
    "SepCLRLoss": (
        0.5,
        "salient_weight background_weight independence_weight",
        "reduction process_group exchange",
        "embeddings * salient is_target",
    ),
    "SubspaceMarginLoss": (
        1.0,
        "boundary margin least_distance num_slices",
        "temperature learnable_temperature normalize backend process_group exchange",
        "embeddings labels cluster_ids",
    ),
    "SlotConLoss": (
        0.1,
        "teacher_temperature slot_temperature distillation_weight",
        "reduction process_group exchange",
        "queries keys prototypes * teacher_prototypes teacher_center overlap predictor",
    ),
    "SupConLoss": (
        0.1,
        "form contrast_mode unassigned",
        "",
        "embeddings labels indices_tuple ref_emb ref_labels * mask",
    ),
    "SwAVLoss": (0.1, "epsilon iterations global_views", "exchange", "embeddings prototypes * queue"),
    "WhitenedCSELoss": (0.05, "groups eps head through_covariance", ONE_PROCESS, "embeddings * shuffles generator"),
}
# One word for one thing, in this order where several come by place; those between are pytorch-metric-learning's words.
METRIC_LEARNING = ("indices_tuple", "ref_emb", "ref_labels")
POSITIONAL = ("embeddings", "queries", "keys", "labels", *METRIC_LEARNING, "cluster_ids", "centers", "prototypes")
every_name = pytest.mark.parametrize("name", family.losses())


def breaches(loss):
    """Where the signatures of a loss are not as the rule is."""
    parameter, found = inspect.Parameter, []
    first, *options = inspect.signature(loss).parameters.values()
    if first.name != "temperature" or first.kind is not parameter.POSITIONAL_OR_KEYWORD:
        found.append("its first argument is not the temperature")
    found += [f"{p.name} has a place" for p in options if p.kind is not parameter.KEYWORD_ONLY]
    found += [f"{p.name} has no default" for p in (first, *options) if p.default is parameter.empty]
    if {p.name: p.default for p in options[-len(COMMON) :]} != COMMON:
        found.append("it does not end with the common options")
    found += [f"{p.name} is a count" for p in options if p.name == "negatives"]
    found += [f"{name} is unknown" for name in loss.unsupported if name not in {"temperature", *COMMON}]
    given = list(inspect.signature(loss.forward).parameters.values())[1:]
    placed = [p.name for p in given if p.kind is not parameter.KEYWORD_ONLY]
    words = [name for name in POSITIONAL if name in placed]
    if placed != words or not {"embeddings", "queries"} & set(placed[:1]):
        found.append(f"forward takes {placed} by place")
    return found


@every_name
def test_signatures_keep_the_rule(name):
    loss = getattr(ccl_fast.losses, name)
    assert issubclass(loss, Loss) and not breaches(loss)


@every_name
def test_signatures_are_these(name):
    loss = getattr(ccl_fast.losses, name)
    temperature, own, unsupported, arguments = SIGNATURES[name]
    options = inspect.signature(loss).parameters
    assert list(options) == ["temperature", *own.split(), *COMMON] and options["temperature"].default == temperature
    assert loss.unsupported == tuple(unsupported.split())
    forward = list(inspect.signature(loss.forward).parameters.values())[1:]
    by_name = [p.name for p in forward if p.kind is inspect.Parameter.KEYWORD_ONLY]
    placed = [p.name for p in forward[: len(forward) - len(by_name)]]
    assert [*placed, *(["*"] if by_name else []), *by_name] == arguments.split()


def test_the_table_of_the_docs_is_that_of_the_docstrings():
    """`python -m benchmarks family` writes it."""
    page = (ROOT / "docs" / "objectives.md").read_text()
    assert "\n".join(("<!-- classes -->", *family.table(), "<!-- /classes -->")) in page
    assert all(f"\n| `{name}` | " in page for name in SIGNATURES)


def test_the_rule_finds_who_breaks_it():
    class Positional(Loss):
        def __init__(self, temperature=0.1, margin=0.0, **common):
            super().__init__(temperature, **common)

        def forward(self, embeddings, labels):
            return embeddings.sum()

    class WithoutCommonOptions(Loss):
        def __init__(self, temperature=0.1, *, negatives=5):
            super().__init__(temperature)

        def forward(self, z, labels):
            return z.sum()

    class OutOfOrder(Loss):
        def forward(self, queries, cluster_ids, keys=None):
            return queries.sum()

    assert breaches(Positional) == ["margin has a place"]
    assert breaches(WithoutCommonOptions) == [
        "it does not end with the common options",
        "negatives is a count",
        "forward takes ['z', 'labels'] by place",
    ]
    assert breaches(OutOfOrder) == ["forward takes ['queries', 'cluster_ids', 'keys'] by place"]


OTHER_VALUES = {
    "temperature": 0.5,
    "learnable_temperature": True,
    "normalize": False,
    "reduction": "none",
    "backend": "blocked",
    "process_group": "world",
    "exchange": "ring",
}


@every_name
def test_an_option_is_taken_or_refused_in_one_sentence(name):
    loss = getattr(ccl_fast.losses, name)
    for option, value in OTHER_VALUES.items():
        if option not in loss.unsupported:
            module = loss(**{option: value})
            assert option == "learnable_temperature" or getattr(module, option) == value
            continue
        default = inspect.signature(loss).parameters[option].default
        assert isinstance(loss(**{option: default}), loss)
        message = f"{option}: expected {default!r}, the only value that {name} can honour, got {value!r}"
        with pytest.raises(ArgumentError) as caught:
            loss(**{option: value})
        assert str(caught.value) == message
    if "temperature" in loss.unsupported:
        with pytest.raises(ArgumentError, match=r"temperature: expected .* the only value"):
            loss().temperature = 0.5


@every_name
def test_the_options_are_shown(name):
    loss = getattr(ccl_fast.losses, name)
    for option, parameter in inspect.signature(loss).parameters.items():
        if option not in loss.unsupported and isinstance(parameter.default, bool | str):
            shown = option not in ("learnable_temperature", "exchange")  # the latter with a group
            assert (f"{option}={parameter.default!r}" in repr(loss())) == shown
