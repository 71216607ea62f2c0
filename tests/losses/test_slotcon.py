"""SlotConLoss against its definition, and the authors' figure."""

import pytest
import torch

from ccl_fast.losses import SlotConLoss
from tests.oracles.losses import assert_matches, differentiate, learnable, unit
from tests.oracles.matrices import slotcon
from tests.oracles.waves import waves

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
GIVEN = {
    "alone": (),
    "a teacher's prototypes": ("teacher_prototypes",),
    "a centre": ("teacher_prototypes", "teacher_center"),
    "an overlap": ("overlap",),
    "a predictor": ("teacher_center", "predictor"),
}


def given(images=3, pixels=8, k=5, d=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def rows(*shape):
        return torch.randn(*shape, d, generator=generator, dtype=torch.float64)

    x = [rows(images, pixels), rows(images, pixels), rows(k)]
    more = {
        "teacher_prototypes": x[2] + 0.3 * rows(k),
        "teacher_center": torch.linspace(-0.1, 0.1, k, dtype=torch.float64),
        "overlap": tuple(0.9 * unit(rows(7)) for _ in range(2)),
    }
    return [y.to(dtype) for y in x], more, rows(d)


def check(names=(), dtype=torch.float64, tolerance=1e-10, temperature=0.1, backend="auto", sizes=(), **options):
    rows, more, matrix = given(*sizes, dtype=dtype)
    more |= {"predictor": lambda slots: (slots @ matrix.to(slots.dtype)).tanh()}
    more = {name: more[name] for name in names}
    module = learnable(SlotConLoss, temperature, backend=backend, **options)
    leaves = [x.clone().requires_grad_() for x in rows]
    differentiated = [leaves[0], leaves[2]]
    actual = differentiate(module(*leaves, **more), [*differentiated, *module.parameters()])
    assert leaves[1].grad is None
    exact = [x.double().requires_grad_() for x in rows]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = slotcon(*exact, temperature=log_temperature.exp(), **more, **options)
    assert_matches(actual, differentiate(expected, [exact[0], exact[2], log_temperature]), tolerance)


@pytest.mark.parametrize("names", GIVEN.values(), ids=GIVEN)
def test_the_definition(names, backend):
    check(names, backend=backend)


@pytest.mark.parametrize("sizes", ((1, 1, 3), (2, 3, 11), (4, 9, 1), (3, 2, 2)), ids=str)
def test_sizes(sizes):
    check(("teacher_center",), sizes=sizes)


@pytest.mark.parametrize(
    "options",
    ({"temperature": 1.0}, {"teacher_temperature": 0.5}, {"slot_temperature": 1.0}, {"normalize": False},
     {"distillation_weight": 0.1}),
)  # fmt: skip
def test_options(options):
    check(**options)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-4), (torch.bfloat16, 0.06), (torch.float16, 0.01)))
def test_dtypes(dtype, tolerance):
    check(dtype=dtype, tolerance=tolerance)


def test_the_figure_of_the_authors_code():
    student, teacher = waves(12, 3), waves(12, 3, 1.2, 0.5)
    loss = SlotConLoss(distillation_weight=1.0)(
        student[None],
        teacher[None],
        waves(4, 3, 0.9, 0.1),
        teacher_center=torch.linspace(-0.1, 0.1, 4, dtype=torch.float64),
    )
    assert loss.item() == pytest.approx(5.942195, abs=1e-6)


def test_a_prototype_that_wins_no_pixel_has_no_slot():
    corners = torch.eye(4, dtype=torch.float64)
    pixels = corners[[0, 1, 0, 1]][None]
    few = SlotConLoss(distillation_weight=0.0)(pixels, pixels, corners[:2])
    torch.testing.assert_close(SlotConLoss(distillation_weight=0.0)(pixels, pixels, corners), few, rtol=0, atol=1e-5)
    # And of one slot alone there is nothing to contrast.
    assert SlotConLoss(distillation_weight=0.0)(pixels[:, ::2], pixels[:, ::2], corners).abs() < 1e-12


def test_without_images_there_is_a_zero_with_a_graph():
    empty = torch.zeros(0, 4, 6, requires_grad=True)
    loss = SlotConLoss()(empty, empty.detach(), torch.randn(3, 6))
    loss.backward()
    assert loss == 0 and empty.grad is not None


def test_errors():
    (x, y, c), more, _ = given()
    for arguments, options, message in (
        ((x[0], y, c), {}, r"queries: expected shape \[b, pixels, d\], got \[8, 6\]"),
        ((x, y[:2], c), {}, r"keys: expected shape \[3, 8, 6\], got \[2, 8, 6\]"),
        ((x, y[:, :2], c), {}, r"keys: expected shape \[3, 8, 6\], got \[3, 2, 6\]"),
        ((x, y, c[:, :2]), {}, r"prototypes: expected shape \[rows, 6\], got \[5, 2\]"),
        ((x, y, c[:0]), {}, r"prototypes: expected at least one row"),
        ((x, y, c), {"teacher_prototypes": c[1:]}, r"teacher_prototypes: expected shape \[5, 6\] .*, got \[4, 6\]"),
        ((x, y, c), {"teacher_center": c[0]}, r"teacher_center: expected shape \[5\], got \[6\]"),
        ((x, y, c), {"overlap": (x[0], y[0, :, :2])}, r"overlap\[1\]: expected shape \[rows, 6\], got \[8, 2\]"),
        ((x, y, c), {"overlap": (x[0], y[0, 1:])}, r"teacher_z: expected 8 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            SlotConLoss()(*arguments, **options)
    assert more
    with pytest.raises(ValueError, match=r"slot_temperature: expected a positive number, got 0"):
        SlotConLoss(slot_temperature=0)
