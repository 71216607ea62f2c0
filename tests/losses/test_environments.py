"""Where losses run besides eager mode: torch.func, meta and fake tensors, torch.export, autocast of mixed rows."""

import contextlib
import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, export
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from ccl_fast import losses
from ccl_fast.ops import streaming_logsumexp
from ccl_fast.ops.differentiable import Differentiable
from tests.losses.test_contract import USES, Bound, dense, every_use, views

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of torch 2.11, of what it does itself: in forward mode, and when an exported program is loaded.
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
        "ignore:The given buffer is not writable:UserWarning",
    ),
]
DRAWN_IN_THE_CALL = {"scgc", "pamc of a graph", "feature transformation"}  # by the arguments of the test
ON_THE_HOST = {"interclr", "adameow"}  # what the test draws, and weights that are no argument of the model
COUNTED = {"pamc", "pamc of a graph", "pamc of nodes"}  # clusters, which decide how much is computed


def every_use_but(*without):
    chosen = {name: use for name, use in USES.items() if name not in set().union(*without)}
    return pytest.mark.parametrize("use", chosen.values(), ids=chosen)


# ---- torch.func ----


@every_use
def test_grad_is_what_backward_finds(use, backend):
    module = use.learnable(backend=backend)
    z = views().requires_grad_()
    module(z).backward()
    torch.testing.assert_close(grad(module)(z.detach()), z.grad)
    of_parameters = grad(lambda given: functional_call(module, given, (z.detach(),)))(dict(module.named_parameters()))
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(of_parameters[name], parameter.grad)


@every_use
def test_vjp_and_jacrev_are_what_backward_finds(use):
    module = use.module(backend="blocked")
    z = views().requires_grad_()
    value = module(z)
    value.backward()
    found, pull = vjp(module, z.detach())
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(pull(torch.ones_like(found))[0], z.grad)
    with torch.no_grad():
        torch.testing.assert_close(pull(torch.ones_like(found))[0], z.grad)
    torch.testing.assert_close(jacrev(module)(z.detach()), z.grad)


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:There is a performance drop.*aten::")  # under vmap
@every_use_but(DRAWN_IN_THE_CALL)
def test_vmap_is_a_loop(use, backend):
    module, several = use.module(backend=backend), torch.stack([views(seed=seed) for seed in range(3)])
    torch.testing.assert_close(vmap(module)(several), torch.stack([module(z) for z in several]))
    torch.testing.assert_close(vmap(grad(module))(several), torch.stack([grad(module)(z) for z in several]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # which torch.func.jvp calls
@every_use
def test_forward_mode_is_refused_by_name(use):
    z, module = views(), use.module(backend="blocked")
    with pytest.raises(RuntimeError, match=r"^\w+: forward-mode derivatives .*Use the reverse mode's"):
        jvp(module, (z,), (z,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode derivatives"):
        module(torch.autograd.forward_ad.make_dual(z, z))


def test_a_second_derivative_under_grad_is_refused_as_in_eager_mode():
    def loss(z):
        return streaming_logsumexp(z, scale=1.0, backend="blocked").sum()

    with pytest.raises(RuntimeError, match="double backward"):
        grad(lambda z: grad(loss)(z).sum())(views()[:, 0])


def test_a_function_of_its_own_gradient_says_what_it_needs_by_its_inputs_alone():
    """In eager mode, under torch.func and compiled: x y, with the gradient of 2 x y, so that it is told apart."""

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def gradients(ctx, by):
        x, y = ctx.saved_tensors
        return 2 * by * y, 2 * by * x

    product = Differentiable("product", torch.mul, save, gradients)
    x, y = torch.tensor(3.0), torch.tensor(5.0)
    leaf = x.clone().requires_grad_()
    product(leaf, y).backward()
    compiled = torch.compile(lambda a: product(a, y), fullgraph=True, backend="aot_eager")
    again = x.clone().requires_grad_()
    compiled(again).backward()
    assert leaf.grad == again.grad == grad(product)(x, y) == 10.0
    assert torch.equal(vmap(grad(product), (0, None))(torch.stack((x, x)), y), torch.tensor([10.0, 10.0]))
    assert compiled(x) == 15.0


# ---- tensors without numbers ----


@every_use_but(COUNTED, ON_THE_HOST)
def test_a_meta_tensor_gives_a_meta_number(use):
    arguments = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, use.arguments(views()))
    leaf = next(x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)).requires_grad_()
    loss = Bound(use.module().loss_fn, lambda z: arguments)(None)
    loss.backward()
    assert loss.is_meta and loss.shape == () and loss.dtype == torch.float64
    assert leaf.grad.is_meta and leaf.grad.shape == leaf.shape


def test_what_must_count_refuses_a_meta_tensor():
    z, ids = torch.empty(8, 4, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"^cluster_ids: expected a tensor with values.*got a meta tensor"):
        losses.PamCLoss()(z, z, ids)
    with pytest.raises(ValueError, match=r"^labels: expected a tensor with values.*got a meta tensor"):
        losses.NTXentLoss()(z, ids)


@every_use_but(COUNTED, ON_THE_HOST)
def test_a_fake_tensor_gives_a_fake_number(use):
    module = use.module()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        z = mode.from_tensor(views()).requires_grad_()
        loss = module(z)
        loss.backward()
    assert type(loss) is type(z) and loss.shape == () and z.grad.shape == z.shape


# ---- torch.export ----


class Towers(nn.Module):
    """An encoder of one tower or of several, and a loss; further arguments are the loss's."""

    def __init__(self, loss, towers):
        super().__init__()
        self.encoder, self.loss, self.towers = nn.Linear(12, 8), loss, towers

    def forward(self, arguments):
        rows = [self.encoder(x) for x in arguments[: self.towers]]
        return self.loss(*rows, *arguments[self.towers :])


def random_rows(*shape):
    return lambda n: torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


def random_ids(n):
    return torch.randint(3, (n,), generator=torch.Generator().manual_seed(n))


def fixed_centers(n):
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


ROWS, VIEWS = random_rows(12), random_rows(2, 12)
EXPORTED = {
    "ccl": (losses.CCLLoss(), 1, VIEWS, random_ids, fixed_centers),
    "ccl split": (losses.CCLLoss(form="split", reduction="none"), 1, VIEWS, random_ids, fixed_centers),
    "ccl inside": (losses.CCLLoss(form="inside"), 1, ROWS, random_ids, fixed_centers),
    "ccl with an instance weight": (losses.CCLLoss(instance_weight=0.3), 1, VIEWS, random_ids),
    "ccl reference": (losses.CCLLoss(backend="reference"), 1, ROWS, random_ids),
    "ntxent": (losses.NTXentLoss(), 1, VIEWS),
    "ntxent of two views": (losses.NTXentLoss(), 2, ROWS, ROWS),
    "ntxent of labels": (losses.NTXentLoss(), 1, ROWS, random_ids),
    "supcon": (losses.SupConLoss(), 1, ROWS, random_ids),
    "supcon inside": (losses.SupConLoss(form="inside"), 1, VIEWS, random_ids),
    "infonce": (losses.InfoNCELoss(), 1, VIEWS),
    "clip": (losses.InfoNCELoss(0.07, learnable_temperature=True), 2, ROWS, ROWS),
    "centre negatives": (losses.CenterNegativesLoss(), 1, VIEWS, random_ids, fixed_centers),
    "swav": (losses.SwAVLoss(), 1, VIEWS, fixed_centers),
    "hard contrastive": (losses.HardContrastiveLoss(alpha=0.3), 1, VIEWS),
    "cmim": (losses.CMIMLoss(), 1, ROWS),
    "cmim of views": (losses.CMIMLoss(), 1, VIEWS),
    "meow": (losses.MEOWLoss(), 1, VIEWS, random_ids),
    "cacr": (losses.CACRLoss(), 1, ROWS, random_ids),
    "lightgcl": (losses.LightGCLLoss(), 2, ROWS, ROWS),
    "pamc": (losses.PamCLoss(), 2, ROWS, ROWS, random_ids),
}
ESSENTIAL = {"ccl", "ntxent", "supcon", "clip"}


@pytest.mark.parametrize(
    "name", [name if name in ESSENTIAL else pytest.param(name, marks=pytest.mark.slow) for name in EXPORTED]
)
def test_an_exported_model_takes_batches_of_any_size(name):
    loss, towers, *given = EXPORTED[name]
    model = Towers(copy.deepcopy(loss), towers)
    arguments = tuple(make(8) for make in given)
    rows = Dim("rows", min=3, max=4096)
    shapes = [None if make is fixed_centers else {0: rows} for make in given]
    program = export(model, (arguments,), dynamic_shapes={"arguments": tuple(shapes)})
    if name == "clip":
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        program = torch.export.load(file)
    exported = program.module()
    for n in (3, 8, 33):
        arguments = tuple(make(n) for make in given)
        value = model(arguments)
        torch.testing.assert_close(exported(arguments), value)
    model.zero_grad()
    value.sum().backward()
    exported(arguments).sum().backward()
    for key, parameter in exported.named_parameters():
        torch.testing.assert_close(parameter.grad, model.get_parameter(key).grad, rtol=1e-4, atol=1e-5)


# ---- tensors of inference mode ----


@pytest.mark.parametrize("normalize", [True, False])
@every_use
def test_what_was_made_in_inference_mode_is_taken_outside(use, normalize, backend):
    """Such as centres, ids and concentrations of a clustering that was fitted there."""
    module, z = use.module(normalize=normalize, backend=backend), views().requires_grad_()
    arguments = use.arguments(z)
    with torch.inference_mode():
        made = [tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, x) for x in arguments]
    wanted = [x.clone_state() if isinstance(x, torch.Generator) else x for x in arguments]
    depends = [any(x.requires_grad for x in dense([own])) for own in arguments]
    given = [own if kept else new for own, new, kept in zip(arguments, made, depends, strict=True)]
    results = []
    for these in (wanted, given):
        value = Bound(module.loss_fn, lambda z, these=these: these)(z)
        results.append((value, *torch.autograd.grad(value, z, retain_graph=True)))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


# ---- rows of several dtypes ----


def test_autocast_takes_rows_of_two_dtypes():
    """A float32 queue, centres, or the tower that ends in a LayerNorm, beside bfloat16 embeddings."""
    z, ids, queue = torch.randn(8, 2, 16), torch.arange(8) % 3, torch.randn(20, 16)
    half, centers = z.bfloat16(), torch.randn(3, 16)
    calls = {
        losses.InfoNCELoss(): [
            (half[:, 0], z[:, 1]), (z[:, 0], half[:, 1]), (half[:, 0], half[:, 1].float()),
        ],
        losses.NTXentLoss(): [(half[:, 0], z[:, 1]), (z[:, 0], half[:, 1])],
        losses.CCLLoss(): [(half, ids, centers)],
        losses.SwAVLoss(): [(half, centers)],
    }  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss_fn, several in calls.items():
            for given in several:
                expected = loss_fn(*(x.bfloat16() if x.is_floating_point() else x for x in given))
                torch.testing.assert_close(loss_fn(*given), expected, rtol=2e-2, atol=2e-2)
        moco = losses.InfoNCELoss(symmetric=False, in_batch_negatives=False)
        expected = moco(half[:, 0], half[:, 1], negatives=queue.bfloat16())
        torch.testing.assert_close(moco(half[:, 0], half[:, 1], negatives=queue), expected, rtol=2e-2, atol=2e-2)
        with pytest.raises(ValueError, match=r"^keys: expected dtype torch.bfloat16 .*got torch.float64"):
            losses.InfoNCELoss()(half[:, 0], z[:, 1].double())
    with pytest.raises(ValueError, match=r"^keys: expected dtype torch.bfloat16 .*got torch.float32"):
        losses.InfoNCELoss()(half[:, 0], z[:, 1])


# ---- defaults that the user has set ----


@contextlib.contextmanager
def default(what):
    """A default device, or a default dtype, of whoever calls a loss."""
    if what == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(what)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@every_use
@pytest.mark.parametrize("what", ["meta", torch.float64, torch.float16], ids=str)
def test_neither_default_device_nor_default_dtype_matters(use, what):
    z = views(torch.float32).requires_grad_()
    arguments, results = use.arguments(z), []
    module = use.module(backend="blocked")
    for context in (contextlib.nullcontext(), default(what)):
        given = [x.clone_state() if isinstance(x, torch.Generator) else x for x in arguments]
        with context:
            value = Bound(module.loss_fn, lambda z, given=given: given)(z)
            results.append((value, *torch.autograd.grad(value, z, retain_graph=True)))
    for expected, found in zip(*results, strict=True):
        assert found.device == expected.device and found.dtype == expected.dtype and torch.equal(found, expected)
