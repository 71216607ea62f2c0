"""The losses over the batch of all processes against the single process on the concatenated batch."""

import os
import time
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ccl_fast import CCLLoss, InfoNCELoss, NTXentLoss, SupConLoss
from ccl_fast.distributed.group import ALL_GATHER
from ccl_fast.errors import PeerError
from ccl_fast.ops.logsumexp import blocked
from ccl_fast.training.gradient_cache import cached_backward
from tests.processes import ProcessFailure, run
from tests.tolerance import FLOOR

pytestmark = pytest.mark.xdist_group("test_distributed_losses")
LOSSES = {"ccl": CCLLoss, "supcon": SupConLoss, "infonce": InfoNCELoss}
CLUSTERS = 4


@dataclass
class Case:
    loss: str = "ccl"
    sizes: tuple = (7, 9)  # samples of every process
    views: int | None = 2  # None: embeddings [n, d]
    ids: bool = True
    centers: bool = True
    towers: bool = False
    negatives: bool = False
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    cluster_temperatures: bool = False
    options: dict = field(default_factory=dict)

    def inputs(self) -> dict:
        """Of all processes."""
        draw = torch.Generator().manual_seed(0)
        n, d = sum(self.sizes), 10
        shape = (n, d) if self.views is None else (n, self.views, d)
        inputs = {"embeddings": torch.randn(shape, generator=draw, dtype=torch.float64)}
        if self.towers:
            inputs["keys"] = torch.randn(n, d, generator=draw, dtype=torch.float64)
        if self.negatives:
            inputs["negatives"] = torch.randn(5, d, generator=draw, dtype=torch.float64)
        if self.ids:
            inputs["ids"] = torch.randint(-1, CLUSTERS, (n,), generator=draw)
        if self.centers:
            inputs["centers"] = torch.randn(CLUSTERS, d, generator=draw, dtype=torch.float64)
        if self.cluster_temperatures:
            inputs["temperatures"] = torch.rand(CLUSTERS, generator=draw, dtype=torch.float64) / 5 + 0.05
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    def evaluate(self, inputs: dict, dtype: torch.dtype, **more) -> dict:
        """Value, and gradients of the embeddings (and keys) and of the temperature."""
        module = LOSSES[self.loss](**{**self.options, **more})
        moved = {k: v.detach().to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        leaves = [moved[k].requires_grad_() for k in ("embeddings", "keys") if k in moved]
        first = moved["embeddings"]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast and dtype != torch.float64):
            if self.loss == "infonce":
                value = module(first, moved.get("keys"), negatives=moved.get("negatives"))
            elif self.loss == "supcon":
                value = module(first, moved.get("ids"))
            else:
                temperatures = {"center_temperature": moved.get("temperatures")}
                value = module(first, moved.get("ids"), moved.get("centers"), **temperatures)
        leaves += list(module.parameters())
        value.sum().backward()
        assert all(x.grad is not None and x.grad.dtype == x.dtype for x in leaves)
        return {"value": value.detach(), "grads": [x.grad for x in leaves]}


def part(x, sizes, rank):
    return x.split(list(sizes))[rank].clone()


def of_process(case, more):
    rank, inputs = dist.get_rank(), case.inputs()
    for name in ("embeddings", "keys", "ids"):
        if name in inputs:
            inputs[name] = part(inputs[name], case.sizes, rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "BLOCK", 16)
        return case.evaluate(inputs, case.dtype, process_group="world", **more)


def assert_exact(case, **more):
    """Values, and gradients over the number of processes, to the rounding of the dtype, against float64."""
    found = run(of_process, len(case.sizes), case, more)
    inputs = case.inputs()
    exact = case.evaluate(inputs, torch.float64, backend="reference")
    plain = case.evaluate(inputs, case.dtype, backend="reference")
    floor = FLOOR[torch.bfloat16 if case.autocast else case.dtype]
    parameters = len(exact["grads"]) - 1 - case.towers

    def close(actual, of_exact, of_plain, what):
        error, allowed = (actual.double() - of_exact).norm(), 2 * (of_plain.double() - of_exact).norm()
        assert error <= allowed + 2 * floor * of_exact.norm() + 1e-30, f"{what}: {error:.2e}"

    for rank, result in enumerate(found):
        none = case.options.get("reduction") == "none"
        value = [x["value"] if not none else part(x["value"], case.sizes, rank) for x in (exact, plain)]
        close(result["value"], *value, f"value on process {rank}")
        for i, (gradient, of_exact, of_plain) in enumerate(
            zip(result["grads"], exact["grads"], plain["grads"], strict=True)
        ):
            if i >= len(exact["grads"]) - parameters:
                close(gradient, of_exact, of_plain, f"gradient of the temperature on process {rank}")
                assert gradient.equal(found[0]["grads"][i])
            else:
                times = 1 if none else len(case.sizes)
                expected = (times * part(x, case.sizes, rank) for x in (of_exact, of_plain))
                close(gradient, *expected, f"gradient {i} on process {rank}")


OBJECTIVES = [
    Case(),
    Case(options={"form": "split"}),
    Case(options={"form": "inside"}),
    Case(options={"instance_weight": 0.4}),
    Case(centers=False),
    Case(ids=False, centers=False),
    Case(cluster_temperatures=True, options={"center_weight": 0.5}),
    Case(views=None, options={"normalize": False, "temperature": 2.0}),
    Case(loss="supcon", centers=False, views=None),
    Case(loss="supcon", centers=False, views=3, options={"form": "inside"}),
    Case(loss="supcon", centers=False, views=3, options={"contrast_mode": "one"}),
    Case(loss="supcon", centers=False, options={"contrast_mode": "one", "form": "inside"}),
    Case(loss="infonce", ids=False, centers=False),
    Case(loss="infonce", ids=False, centers=False, negatives=True),
    Case(loss="infonce", ids=False, centers=False, views=None, towers=True),
    Case(loss="infonce", ids=False, centers=False, views=None, towers=True, options={"symmetric": False}),
]
NAMES = [f"{c.loss} {c.views} views {'towers' if c.towers else ''} {c.options}" for c in OBJECTIVES]


@pytest.mark.parametrize("exchange", ["all-gather", "ring"])
@pytest.mark.parametrize("sizes", [(7, 9), (6, 6), (5, 0, 9)], ids=str)
@pytest.mark.parametrize("case", OBJECTIVES, ids=NAMES)
def test_every_objective_is_that_of_the_whole_batch(case, sizes, exchange):
    options = case.options | {"learnable_temperature": True}
    assert_exact(Case(**{**vars(case), "sizes": sizes, "options": options}), exchange=exchange)


@pytest.mark.parametrize("exchange", ["all-gather", "ring"])
@pytest.mark.parametrize(
    "sizes", [(4,), (0,), (1, 0), (0, 0, 0), (0, 0, 3), (1, 1, 1), (4, 4, 4), (40, 3, 17), (33, 33)], ids=str
)
def test_any_sizes(sizes, exchange):
    assert_exact(Case(sizes=sizes, options={"learnable_temperature": True}), exchange=exchange)
    assert_exact(Case(sizes=sizes, options={"form": "inside"}), exchange=exchange)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("form", ["joint", "inside"])
def test_reductions(reduction, form):
    options = {"reduction": reduction, "form": form, "learnable_temperature": True}
    assert_exact(Case(sizes=(5, 3, 4), options=options))


@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("form", ["joint", "inside"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float64, False), (torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=str,
)
def test_dtypes_and_cold_temperatures(dtype, autocast, form, temperature):
    options = {"form": form, "temperature": temperature}
    assert_exact(Case(sizes=(20, 13), dtype=dtype, autocast=autocast, options=options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", ["joint", "inside"])
def test_triton_kernels(dtype, form):
    if torch.cuda.is_available():
        pytest.skip("its processes have CPU tensors")
    assert_exact(Case(sizes=(5, 0, 6), dtype=dtype, options={"form": form, "backend": "triton"}))


def test_the_reference_gathers_with_autograd():
    assert_exact(Case(sizes=(5, 3, 4), options={"backend": "reference", "learnable_temperature": True}))
    assert_exact(Case(sizes=(5, 3), options={"backend": "reference", "form": "inside"}))


@pytest.mark.parametrize("processes", [2, 3, 4, 5])
@pytest.mark.parametrize("exchange", ["all-gather", "ring"])
def test_each_pair_of_rows_is_met_once(processes, exchange):
    for sizes in ([4] * processes, list(range(1, processes + 1))):
        met = sum(torch.stack(run(_meetings, processes, sizes, exchange)))
        whole = torch.full_like(met, 1)
        blocks = torch.block_diag(*(torch.ones(n, n) for n in sizes))
        assert (met + met.T).equal(whole - blocks)


def _meetings(sizes, exchange):
    from ccl_fast.distributed import Exchange, open_group

    rank = dist.get_rank()
    starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    numbers = torch.arange(sizes[rank]) + starts[rank]
    met = torch.zeros(sum(sizes), sum(sizes))
    for block in Exchange(open_group("world"), sizes, exchange).rows((numbers,)).visit(half=True):
        (there,) = block.tensors
        expected = torch.cat([torch.arange(starts[rank] + s.start, starts[rank] + s.stop) for rank, s in block.owners])
        assert there.equal(expected)
        met[numbers[block.own_rows][:, None], there[None, :]] += 1
    return met


# ---- with a model ----


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8))
        self.loss_fn = None

    def forward(self, x):
        return self.layers(x)


def model_and_batch(sizes):
    torch.manual_seed(3)
    model = Encoder()
    return model, torch.randn(sum(sizes), 2, 6), torch.randint(-1, CLUSTERS, (sum(sizes),)), torch.randn(CLUSTERS, 8)


def trained_by_ddp(sizes, way):
    model, x, ids, centers = model_and_batch(sizes)
    rank = dist.get_rank()
    x, ids = part(x, sizes, rank), part(ids, sizes, rank)
    loss_fn = CCLLoss(learnable_temperature=True, process_group=dist.group.WORLD)
    if way == "compiled":
        loss_fn = torch.compile(loss_fn, backend="aot_eager")
    ddp = DistributedDataParallel(model)

    def loss_of(rows):
        return loss_fn(rows.unflatten(0, (len(ids), 2)), ids, centers)

    if way == "cached":
        loss = cached_backward(ddp, x.flatten(0, 1), loss_of, 4)
    else:
        loss = loss_of(ddp(x.flatten(0, 1)))
        loss.backward()
    gradients = [p.grad for p in [*model.parameters(), *loss_fn.parameters()]]
    return loss.detach(), gradients


@pytest.mark.parametrize(
    ("sizes", "way"),
    [
        ((8, 8), "plain"),
        ((7, 4, 9), "cached"),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in (((8, 8), "cached"), ((8, 8), "compiled"), ((7, 4, 9), "plain"), ((7, 4, 9), "compiled"))
        ),
    ],
    ids=str,
)
def test_ddp_makes_the_gradient_of_the_single_process(sizes, way):
    model, x, ids, centers = model_and_batch(sizes)
    loss_fn = CCLLoss(learnable_temperature=True)
    expected = loss_fn(model(x), ids, centers)
    expected.backward()
    for loss, gradients in run(trained_by_ddp, len(sizes), sizes, way):
        torch.testing.assert_close(loss, expected.detach())
        for gradient, p in zip(gradients, [*model.parameters(), *loss_fn.parameters()], strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)


# ---- what travels ----


def bytes_sent(exchange, backend, n, d):
    """By each process in one forward and backward, as rings of processes would send them."""
    sent, size = [0], dist.get_world_size()

    def counted(function, amount):
        def call(*args, **kwargs):
            sent[0] += amount(*args)
            return function(*args, **kwargs)

        return call

    def nbytes(x):
        return x.numel() * x.element_size()

    amounts = {
        ALL_GATHER: lambda out, x: (size - 1) * nbytes(x),
        "all_reduce": lambda x, *_: 2 * (size - 1) * nbytes(x) // size,
        "all_to_all_single": lambda out, x, *_: nbytes(x),
        "batch_isend_irecv": lambda operations: sum(nbytes(o.tensor) for o in operations if o.op is dist.isend),
    }
    originals = {name: getattr(dist, name) for name in amounts}
    try:
        for name, amount in amounts.items():
            setattr(dist, name, counted(originals[name], amount))
        z = torch.randn(n, d, requires_grad=True)
        loss = SupConLoss(process_group="world", exchange=exchange, backend=backend)
        loss(z, torch.arange(n) % 5).backward()
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
    return sent[0]


@pytest.mark.parametrize("processes", [2, 3])
def test_bytes_sent(processes):
    n, d = 300, 128
    others, row = processes - 1, 4 * d
    fused, ring, plain = (
        run(bytes_sent, processes, exchange, backend, n, d)[0]
        for exchange, backend in (("all-gather", "auto"), ("ring", "auto"), ("all-gather", "reference"))
    )
    # Forward the rows and their ids, and four numbers of half the rows of others; backward five numbers of each row.
    numbers = 5 * 4
    some = 200 * processes  # what the processes agree on, and sum
    assert others * n * (row + 8) <= fused <= others * n * (row + 8 + 2 * numbers) + some
    # The plain way brings a gradient for every row of every process back.
    assert plain >= 3 * others * n * row
    assert plain / fused > 2.7
    hops = processes // 2 + others
    assert hops * n * (row + 8) <= ring <= hops * n * (row + 8) + 2 * others * n * numbers + some


# ---- when something is wrong ----


def caught(loss, change):
    """What process 1 is told if it alone calls with the changes, and what the others are."""
    rank = dist.get_rank()
    arguments = {"embeddings": torch.randn(4, 2, 6), "cluster_ids": torch.zeros(4, dtype=torch.int64)}
    arguments["centers"] = torch.randn(CLUSTERS, 6)
    options = {"process_group": "world"}
    if rank == 1:
        arguments |= {k: v for k, v in change.items() if k in arguments}
        options |= {k: v for k, v in change.items() if k not in arguments}
    autocast = options.pop("autocast", False)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            LOSSES[loss](**options)(**arguments)
    except (ValueError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.randn(4, 2, 6).double()}, "embeddings: expected the same on every process, got float32"),
        ({"embeddings": torch.randn(4, 2, 7), "centers": torch.randn(CLUSTERS, 7)}, r"got float32 \[n, 2, 6\]"),
        ({"embeddings": torch.randn(4, 3, 6)}, r"embeddings: .* float32 \[n, 3, 6\] on process 1"),
        ({"embeddings": torch.randn(4, 2, 6, requires_grad=True)}, "embeddings: .* with gradient on process 1"),
        ({"cluster_ids": None, "centers": None}, "cluster_ids: expected the same on every process, got given"),
        ({"centers": None}, r"centers: .* got float32 \[4, 6\] on process 0 and None on process 1"),
        ({"centers": torch.randn(5, 6)}, r"centers: .* \[4, 6\] on process 0 and float32 \[5, 6\] on process 1"),
        ({"temperature": 0.2}, "temperature: .* got 0.1 on process 0 and 0.2 on process 1"),
        (
            {"learnable_temperature": True},
            "temperature: .* got 0.1 on process 0 and float32 .. with gradient on process 1",
        ),
        ({"form": "inside"}, "form: .* got joint on process 0 and inside on process 1"),
        ({"reduction": "sum"}, "reduction: "),
        ({"exchange": "ring"}, "exchange: "),
        ({"center_weight": 2.0}, "center_weight: "),
        ({"instance_weight": 0.5}, "instance_weight: "),
        ({"center_temperature": 0.3}, "center_temperature: .* got None on process 0 and 0.3 on process 1"),
        ({"backend": "reference"}, "backend: "),
        ({"autocast": True}, r"embeddings: .* got float32 \[n, 2, 6\] on process 0 and bfloat16 \[n"),
    ],
    ids=lambda x: None if isinstance(x, str) else " ".join(x),
)
def test_what_differs_is_named_on_every_process(change, message):
    import re

    for text in run(caught, 3, "ccl", change):
        assert re.search(message, text), text
        assert text.startswith("ArgumentError")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cluster_ids": torch.full((4,), 9)}, "cluster_ids: expected ids from -1 to 3"),
        ({"cluster_ids": torch.zeros(3, dtype=torch.int64)}, "cluster_ids: expected shape"),
        ({"embeddings": torch.zeros(4)}, "embeddings: expected shape"),
        ({"cluster_ids": None}, "cluster_ids: expected integers [n] with centers"),
        ({"centers": torch.zeros(4, 5)}, "centers: expected shape [rows, 6]"),
        ({"center_temperature": torch.ones(3)}, "center_temperature: expected shape [4]"),
        ({"cluster_ids": torch.zeros(4, dtype=torch.float32)}, "cluster_ids: expected integers"),
    ],
    ids=str,
)
def test_an_error_of_one_process_reaches_all(change, message):
    first, second, third = run(caught, 3, "ccl", change)
    assert message in second and "on process" not in second
    kind, words = second.split(": ", 1)
    assert first == third == f"{kind}: on process 1: {words}"


def caught_of_pairs(loss, given):
    """The same of what the losses for metric learning take."""
    z, labels = torch.randn(4, 6), torch.arange(4) % 2
    given = {k: labels if v == "labels" else z if v == "rows" else v for k, v in given.items()}
    given = given if dist.get_rank() == 1 else {"labels": labels if loss is SupConLoss else z}
    try:
        loss(process_group="world")(z, **given)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("loss", "given", "message"),
    [
        (SupConLoss, {"labels": "labels", "indices_tuple": (torch.arange(2),) * 3}, "as its indices are of the rows"),
        (SupConLoss, {"labels": "labels", "ref_emb": "rows", "ref_labels": "labels"}, "as its rows would be those of"),
        (SupConLoss, {"labels": "labels", "ref_labels": "labels"}, "as its rows would be those of one process"),
        (SupConLoss, {"mask": torch.eye(4)}, "as it tells nothing of the samples of other processes"),
        (NTXentLoss, {"labels": "labels"}, "as pairs are those of one process"),
        (NTXentLoss, {"indices_tuple": (torch.arange(2),) * 3}, "as its indices are of the rows of one process"),
    ],
)
def test_what_is_of_one_process_is_refused_on_all(loss, given, message):
    name = next(name for name in given if name != "labels" or len(given) == 1)
    words = f"{name}: expected None with process_group, {message}"
    first, second = run(caught_of_pairs, 2, loss, given)
    assert second.startswith(words)
    assert first.startswith(f"on process 1: {words}")


def loses_a_process(exchange, folder):
    z = torch.randn(2000, 2, 64, requires_grad=True)
    loss = CCLLoss(process_group="world", exchange=exchange)
    loss(z).backward()
    if dist.get_rank() == 1:
        os._exit(7)
    try:
        loss(z).backward()
    except PeerError as error:
        (folder / str(dist.get_rank())).write_text(str(error))


@pytest.mark.parametrize("exchange", ["all-gather", "ring"])
def test_a_process_that_dies_ends_the_others(exchange, tmp_path):
    with pytest.raises(ProcessFailure, match="process 1 of 3 died, exit code 7"):
        run(loses_a_process, 3, exchange, tmp_path, timeout=240, patience=8)
    for rank in (0, 2):
        assert (tmp_path / str(rank)).read_text().startswith(f"process {rank} of 3 has lost another one")


def uneven_norms(form):
    rank = dist.get_rank()
    z = torch.tensor([[[0.1, 0.0], [0.0, 0.1]], [[-4000.0, 0.0]]][rank]).requires_grad_()
    labels = torch.tensor([[0, 1], [0]][rank])
    loss = SupConLoss(1.0, form=form, normalize=False, process_group="world")(z, labels)
    loss.backward()
    return loss.detach(), z.grad


@pytest.mark.parametrize("form", ["outside", "inside"])
def test_rows_whose_only_candidates_are_far_away_on_another_process(form):
    found = run(uneven_norms, 2, form)
    z = torch.tensor([[0.1, 0.0], [0.0, 0.1], [-4000.0, 0.0]], dtype=torch.float64).requires_grad_()
    loss = SupConLoss(1.0, form=form, normalize=False)(z, torch.tensor([0, 1, 0]))
    loss.backward()
    for value, _ in found:
        torch.testing.assert_close(value.double(), loss.detach())
    torch.testing.assert_close(torch.cat([g for _, g in found]).double() / 2, z.grad, rtol=1e-5, atol=1e-6)


def second_derivatives(backend):
    refused = []
    for of in ("z", "temperature"):
        z = torch.randn(4, 2, 6, requires_grad=True)
        module = CCLLoss(learnable_temperature=True, process_group="world", backend=backend)
        x = z if of == "z" else module.log_temperature
        (gradient,) = torch.autograd.grad(module(z), x, create_graph=True)
        try:
            gradient.square().sum().backward()
        except RuntimeError as error:
            refused.append("twice" in str(error))
    return refused


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_second_derivative_is_refused(backend):
    assert run(second_derivatives, 2, backend) == [[True, True]] * 2


def backward_under_autocast():
    torch.manual_seed(dist.get_rank())
    z = torch.randn(20, 16, requires_grad=True)
    loss = SupConLoss(process_group="world")(z, torch.arange(20) % 3)
    plain = torch.autograd.grad(loss, z, retain_graph=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        return plain, torch.autograd.grad(loss, z)[0]


def test_backward_under_autocast_is_the_same():
    for plain, under_autocast in run(backward_under_autocast, 2):
        assert plain.equal(under_autocast)


def rows_alive_after_backward():
    import gc

    z = torch.randn(100, 2, 64, requires_grad=True)
    loss = CCLLoss(process_group="world")(z)
    loss.backward()
    gc.collect()
    return sum(x.numel() for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.numel() > 2 * z.numel())


def test_the_rows_of_all_go_with_the_graph():
    assert run(rows_alive_after_backward, 3) == [0, 0, 0]


def is_left_alone():
    z = torch.randn(20, 2, 6, requires_grad=True)
    loss = CCLLoss(process_group="world")
    loss(z).backward()
    if dist.get_rank() == 1:
        time.sleep(8)
        return "late"
    start = time.monotonic()
    with pytest.raises(PeerError, match="process 0 of 2 has lost another one"):
        loss(z).backward()
    return time.monotonic() - start


def test_a_process_that_does_not_answer_is_given_up_after_the_timeout():
    first, second = run(is_left_alone, 2, timeout=30, patience=3)
    assert first < 7 and second == "late"


def test_without_torch_distributed_and_with_a_wrong_group():
    with pytest.raises(ValueError, match="init_process_group"):
        CCLLoss(process_group="world")(torch.randn(4, 2, 6))
    for wrong in (3, "all", object()):
        with pytest.raises(ValueError, match="process_group: expected"):
            CCLLoss(process_group=wrong)
    with pytest.raises(ValueError, match="exchange: expected one of 'all-gather', 'ring'"):
        CCLLoss(exchange="tree")


def of_a_subgroup():
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        try:
            CCLLoss(process_group=group)(torch.randn(4, 2, 6))
        except ValueError as error:
            return str(error)
    case = Case(sizes=(5, 6))
    inputs = case.inputs()
    for name in ("embeddings", "ids"):
        inputs[name] = part(inputs[name], case.sizes, dist.get_rank() - 1)
    found = [case.evaluate(inputs, torch.float32, process_group=group, exchange=e) for e in ("ring", "all-gather")]
    return [x["value"] for x in found]


def test_a_group_of_some_processes():
    outside, *inside = run(of_a_subgroup, 3)
    assert "process_group: expected" in outside
    case = Case(sizes=(5, 6))
    exact = case.evaluate(case.inputs(), torch.float64)["value"]
    for values in inside:
        for value in values:
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
