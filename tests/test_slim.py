"""`slim` from end to end: what comes back, in which form, and that the original stays as it was."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune

import graphprune as gp
from graphprune.selection.plan import Plan
from graphprune.utils.inputs import call, output_tensors
from tests.models import ALL
from tests.structures import STRUCTURES

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.GraphPruneWarning")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    state = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    buffers = {name: (value.clone(), False) for name, value in model.named_buffers()}
    flags = {
        f"{name}.training": (torch.tensor(m.training), False) for name, m in model.named_modules()
    }
    return state | buffers | flags


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name][0], b[name][0]) and a[name][1] == b[name][1] for name in a
    )


class Net(nn.Module):
    """Convolutions with a residual and a size in the code."""

    def __init__(self, literal: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(32, 10)
        self.literal = literal

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = (x + self.second(x)).mean((2, 3))
        return self.head(self.drop(x.view(-1, 32) if self.literal else x))


class Applied(nn.Module):
    """Two linear layers and a function of what they give."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 3))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layers(x))


class Auxiliary(Net):
    """A second head that runs in training alone, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1)
        )
        self.second_head = nn.Linear(16, 10)
        self.never = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Any:
        features = self.norm(self.first(x))
        logits = self.head((features + self.second(features)).mean((2, 3)))
        if not self.training:
            return logits
        return logits, self.second_head(self.branch(features).flatten(1))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("renormalised", [False, True], ids=["exact", "renormalised"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_hard_structure_is_slimmed_and_verified(name: str, renormalised: bool) -> None:
    model, inputs = STRUCTURES[name].build().eval(), STRUCTURES[name].inputs()
    before = fingerprint(model)
    result = gp.slimmed(model, 0.5, inputs, align=1, renormalised=renormalised)
    assert result.verification is not None
    assert same(before, fingerprint(model))
    larger = gp.Inputs.of(inputs).repeat(2)
    assert all(t.isfinite().all() for _, t in output_tensors(call(result.model, larger)))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", ALL)
def test_every_small_model_is_slimmed_and_runs_at_another_batch_size(
    name: str, ratio: float
) -> None:
    example = ALL[name](small=True)
    result = gp.slimmed(example.model, ratio, example.inputs, align=1)
    assert result.plan.removed > 0
    assert result.verification is not None
    call(result.model, gp.Inputs.of(example.inputs).repeat(2))
    assert gp.count_parameters(result.model) < gp.count_parameters(example.model)


@pytest.mark.parametrize("name", ALL)
def test_every_small_model_is_exported_and_equal_in_onnx_runtime(name: str, tmp_path: Any) -> None:
    example = ALL[name](small=True)
    slimmer = gp.slim(example.model, 0.5, example.inputs)
    exported = gp.export(slimmer, example.inputs, tmp_path / "slim.onnx")
    assert exported.batch_free
    assert exported.difference <= 1e-4


def test_the_module_form_keeps_the_class_and_tells_true_sizes(images: Tensor) -> None:
    slimmer = gp.slim(Net(), 0.5, images)
    assert isinstance(slimmer, Net)
    assert "Conv2d(3, 16," in repr(slimmer)
    assert slimmer.norm.num_features == 16
    assert slimmer.head.in_features == 16


def test_the_original_is_never_changed(images: Tensor) -> None:
    for training in (True, False):
        model = Net().train(training)
        before = fingerprint(model)
        slimmer = gp.slim(model, 0.5, images)
        assert same(before, fingerprint(model))
        assert slimmer.training == training


def test_a_size_in_the_code_gives_a_graph_and_says_why(images: Tensor) -> None:
    result = gp.slimmed(Net(literal=True), 0.5, images)
    assert result.form == "graph"
    assert isinstance(result.model, fx.GraphModule)
    assert "view" in result.why_graph or "shape" in result.why_graph
    assert result.model(images.repeat(3, 1, 1, 1)).shape == (6, 10)
    with pytest.raises(gp.VerificationError, match="the slim model"):
        gp.slim(Net(literal=True), 0.5, images, form="module")


@pytest.mark.filterwarnings("default::graphprune.GraphPruneWarning")
def test_where_sizes_cannot_be_rewritten_the_rest_is_cut() -> None:
    class Untraceable(nn.Module):
        """A size in code that torch.export cannot trace, since values decide where it goes."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = (
                nn.Linear(8, 32),
                nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4)),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).view(-1, 32)
            return self.rest(x.relu() if x.sum().item() > 1e9 else x.sigmoid())

    with pytest.warns(
        gp.GraphPruneWarning, match=r"first.weight:0 stay whole: the model's code may"
    ):
        slimmer = gp.slim(Untraceable(), 0.5, torch.randn(2, 8))
    assert isinstance(slimmer, Untraceable)
    assert slimmer.first.weight.shape == (32, 8)
    assert slimmer.rest[1].weight.shape == (4, 8)


def test_a_module_that_would_not_run_is_not_returned_unverified(images: Tensor) -> None:
    result = gp.slimmed(Net(literal=True), 0.5, images, verify=False)
    assert (result.form, result.verification) == ("graph", None)
    assert result.model(images).shape == (2, 10)


def test_both_forms_of_a_model_agree(images: Tensor) -> None:
    model = Net().eval()
    module, graph = (gp.slim(model, 0.5, images, form=form) for form in ("module", "graph"))
    torch.testing.assert_close(module(images), graph(images))
    assert module.state_dict().keys() - graph.state_dict().keys() <= {"norm.num_batches_tracked"}


def test_the_graph_form_trains(images: Tensor) -> None:
    graph = gp.slim(Net(), 0.5, images, form="graph").train()
    mean = dict(graph.named_buffers())["norm.running_mean"].clone()
    assert not torch.equal(graph(images), graph(images)), "dropout is off in training"
    assert not torch.equal(mean, dict(graph.named_buffers())["norm.running_mean"])
    graph(images).sum().backward()
    assert all(p.grad is not None for p in graph.parameters())
    graph.eval()
    assert torch.equal(graph(images), graph(images))


def test_making_a_graph_says_nothing_of_torch_itself() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gp.slim(Net(), 0.5, torch.randn(2, 3, 16, 16), form="graph")
    assert not [str(warning.message) for warning in caught]


@pytest.mark.parametrize("form", ["module", "graph"])
def test_a_model_may_draw_random_numbers_in_evaluation(form: Any) -> None:
    model, x = Applied(lambda y: y * torch.rand(len(y), 1)), torch.randn(4, 3)
    state = torch.get_rng_state()
    result = gp.slimmed(model, 0.5, x, form=form)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.plan.removed
    assert result.verification is not None


@pytest.mark.parametrize("form", ["module", "graph"])
def test_the_result_copies_pickles_compiles_and_loads(images: Tensor, form: Any) -> None:
    slimmer = gp.slim(Net().eval(), 0.5, images, form=form)
    wanted = slimmer(images)
    torch.testing.assert_close(copy.deepcopy(slimmer)(images), wanted)
    file = io.BytesIO()
    torch.save(slimmer, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(images), wanted)
    torch.testing.assert_close(torch.compile(slimmer, backend="eager")(images), wanted)
    slimmer.load_state_dict(slimmer.state_dict())
    assert slimmer.double()(images.double()).dtype is torch.float64


def test_ties_stay_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.between = nn.Linear(16, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.relu(self.between(self.embed(ids))))

    slimmer = gp.slim(Tied(), 0.5)
    assert slimmer.head.weight is slimmer.embed.weight
    assert slimmer.embed.embedding_dim == 8


def test_inputs_are_guessed_for_common_models() -> None:
    mlp = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    convolutional = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    tokens = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))
    for model in (mlp, convolutional, tokens):
        assert gp.count_parameters(gp.slim(model, 0.5)) < gp.count_parameters(model)


def test_an_exported_program_comes_back_as_one(images: Tensor) -> None:
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Net(literal=True).eval(), (images,), dynamic_shapes=shapes)
    slimmer = gp.slim(program, 0.5)
    assert isinstance(slimmer, torch.export.ExportedProgram)
    assert slimmer.module()(images.repeat(2, 1, 1, 1)).shape == (4, 10)
    assert slimmer.state_dict["first.weight"].shape[0] == 16


def test_a_graph_module_comes_back_as_one(images: Tensor) -> None:
    for literal in (False, True):
        traced = fx.symbolic_trace(Net(literal).eval())
        code = traced.code
        slimmer = gp.slim(traced, 0.5, images)
        assert isinstance(slimmer, fx.GraphModule)
        assert traced.code == code
        assert gp.count_parameters(slimmer) < gp.count_parameters(traced)


def test_unused_and_frozen_parameters_and_half_precision_are_fine(images: Tensor) -> None:
    model = Net().requires_grad_(False)
    model.extra = nn.Linear(5, 5)
    slimmer = gp.slim(model.to(torch.bfloat16), 0.5, images.bfloat16())
    assert slimmer.extra.weight.shape == (5, 5)
    assert slimmer.first.weight.dtype is torch.bfloat16
    assert not slimmer.first.weight.requires_grad


def test_a_model_on_the_meta_device_is_slimmed_by_chance(images: Tensor) -> None:
    with torch.device("meta"):
        model = Net()
    slimmer = gp.slim(model, 0.5, images, importance="random")
    assert slimmer.first.weight.is_meta
    assert slimmer.first.out_channels == 16
    with pytest.raises(gp.InvalidRequestError, match=r"first\.weight is on the meta device"):
        gp.slim(model, 0.5, images)


def test_excluded_groups_stay_and_included_ones_go(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 8, 3))
    assert gp.slim(model, 0.5, images, exclude=["0.*"])[0].out_channels == 16
    only = gp.slim(model, 0.5, images, include=["0.weight"])
    assert [layer.out_channels for layer in only] == [8, 24, 8] or only[0].out_channels == 8


@pytest.mark.parametrize("of", ["parameters", "macs"])
def test_a_global_ratio_is_met(images: Tensor, of: Any) -> None:
    example = ALL["resnet50"](small=True)
    slimmer = gp.slim(example.model, 0.5, example.inputs, of=of, align=1)
    if of == "parameters":
        share = gp.count_parameters(slimmer) / gp.count_parameters(example.model)
    else:
        share = gp.count_macs(slimmer, example.inputs) / gp.count_macs(
            example.model, example.inputs
        )
    assert 0.47 <= share <= 0.5


def test_convolution_channels_are_aligned_by_default() -> None:
    example = ALL["mobilenet_v2"](small=True)
    slimmer = gp.slim(example.model, 0.4, example.inputs)
    widths = {m.out_channels for m in slimmer.modules() if isinstance(m, nn.Conv2d)}
    assert all(width % 4 == 0 for width in widths)


def test_a_plan_saves_loads_and_repeats_the_cut(images: Tensor, tmp_path: Any) -> None:
    model = Net().eval()
    result = gp.slimmed(model, 0.5, images)
    result.plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == result.plan
    again = gp.slim(model, example_inputs=images, plan=plan)
    torch.testing.assert_close(again(images), result.model(images))
    with pytest.raises(gp.PlanError, match="no such group"):
        gp.slim(nn.Linear(3, 4), example_inputs=torch.randn(2, 3), plan=plan)


def test_ratio_zero_changes_nothing(images: Tensor) -> None:
    model = Net().eval()
    torch.testing.assert_close(gp.slim(model, 0, images)(images), model(images))


def test_an_importance_of_ones_own_is_used(images: Tensor) -> None:
    def last_first(model: nn.Module, graph: gp.DependencyGraph) -> dict[str, Any]:
        return {group.name: torch.arange(group.size).numpy() for group in graph.groups}

    plan = gp.slimmed(Net(), 0.5, images, importance=last_first).plan
    assert plan.keep["first.weight:0"] == list(range(16, 32))


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan"), "half", True])
def test_a_ratio_outside_its_range_is_refused(ratio: Any) -> None:
    with pytest.raises(gp.InvalidRequestError, match=r"0 <= ratio < 1"):
        gp.slim(Net(), ratio)


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        ("not a model", None, "must be an nn.Module"),
        (nn.ReLU(), None, "holds no parameters"),
        (nn.Linear(3, 4), torch.randn(2, 5), "does not run on Inputs"),
        (nn.Linear(3, 4), 7, "example_inputs must be a tensor"),
        (nn.Bilinear(2, 3, 4), None, "needs example_inputs"),
        (nn.LazyLinear(3), torch.randn(2, 5), "have no shape yet"),
        (Applied(lambda x: {x}), torch.randn(2, 3), "returns no tensors"),
        (Applied(lambda x: x / 0), torch.randn(2, 3), "no finite number .* verify=False"),
        (
            nn.Sequential(nn.Linear(3, 4), torch.jit.script(nn.Linear(4, 3))),
            torch.randn(2, 3),
            "1 is a TorchScript module",
        ),
    ],
)
def test_bad_models_and_inputs_get_a_clear_error(model: Any, inputs: Any, words: str) -> None:
    with pytest.raises(gp.GraphPruneError, match=words):
        gp.slim(model, 0.5, inputs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"of": "bytes"}, "of='bytes' must be"),
        ({"align": 0}, "align=0 must be"),
        ({"form": "onnx"}, "form='onnx' must be"),
        ({"importance": "luck"}, "importance='luck' is not a criterion"),
        ({"exclude": ["nothing*"]}, "the pattern 'nothing.' fits no parameter"),
        ({"exclude": "first"}, "exclude must be a list"),
    ],
)
def test_bad_options_get_a_clear_error(images: Tensor, options: dict[str, Any], words: str) -> None:
    with pytest.raises(gp.InvalidRequestError, match=words):
        gp.slim(Net(), 0.5, images, **options)


@pytest.mark.filterwarnings("default::graphprune.GraphPruneWarning")
def test_nothing_to_cut_is_a_no_op_that_says_so(images: Tensor) -> None:
    with pytest.warns(gp.GraphPruneWarning, match="no channels of this model can be removed"):
        assert gp.slim(nn.Linear(3, 4), 0.5).weight.shape == (4, 3)
    with pytest.warns(gp.GraphPruneWarning, match="1 excluded"):
        gp.slim(Net(), 0.5, images, exclude=["*"])


@pytest.mark.filterwarnings("default::graphprune.GraphPruneWarning")
def test_a_renormalised_cut_is_warned_about_once() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gp.slim(model, 0.5, renormalised=True)
    assert [w.category for w in caught] == [gp.GraphPruneWarning]
    assert "native_layer_norm takes a statistic" in str(caught[0].message)


def test_a_wrong_slice_is_caught_by_verification(images: Tensor, monkeypatch: Any) -> None:
    from graphprune.shrink import tensors

    def wrong(tensor: Tensor, layouts: Any, masks: Any) -> Tensor | None:
        result = right(tensor, layouts, masks)
        return None if result is None else result.flip(0)

    right = tensors.slice_tensor
    monkeypatch.setattr(tensors, "slice_tensor", wrong)
    with pytest.raises(gp.VerificationError, match="differs by"):
        gp.slim(Net(), 0.5, images, form="module")


@pytest.mark.filterwarnings("default::graphprune.GraphPruneWarning")
def test_what_only_training_reads_is_cut_along_and_what_nothing_reads_is_named(
    images: Tensor,
) -> None:
    with pytest.warns(gp.GraphPruneWarning, match="reads never.weight, never.bias: they keep"):
        slimmer = gp.slim(Auxiliary(), 0.5, images, form="module")
    assert slimmer.branch[0].weight.shape == (8, 16, 1, 1)
    assert [output.shape for output in slimmer.train()(images)] == [(2, 10), (2, 10)]
    with pytest.warns(gp.GraphPruneWarning, match="no code that uses them"):
        gp.slim(Auxiliary(), 0.5, images, form="graph")


def test_what_training_reads_is_found_at_a_batch_of_one_too() -> None:
    """Batch norm refuses to train on a single value a channel, as an auxiliary head often ends in."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
            self.auxiliary = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Any:
            x = self.body(x).relu()
            return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)

    slimmer = gp.slim(Pooled(), 0.5, torch.randn(1, 6))
    assert slimmer.auxiliary[0].weight.shape == (4, 8)
    assert slimmer.train()(torch.randn(2, 6))[1].shape == (2, 3)


def test_a_weight_that_a_hook_makes_is_described_as_it_is_made() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.3)
    slimmer = gp.slim(model, 0.5)
    assert (slimmer[0].out_features, slimmer[2].in_features) == (8, 8)
    assert slimmer[0].weight.shape == slimmer[0].weight_mask.shape == (8, 8)


def test_a_model_in_training_is_slimmed_as_it_evaluates() -> None:
    """Reading a spectral-normed weight in training moves the buffers that it is computed from."""
    layers = [parametrizations.spectral_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4)]
    model = nn.Sequential(*layers).train()
    slimmer = gp.slim(model, 0.5, form="module")
    assert all(module.training for module in slimmer.modules())


def test_a_buffer_that_running_writes_to_stays_as_it_was(tmp_path: Any) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layers(x)

    model = Counting()
    for form in ("module", "graph"):
        gp.slim(model, 0.5, torch.randn(2, 8), form=form)
    gp.export(model, torch.randn(2, 8), tmp_path / "counting.onnx")
    gp.compare(model, model, torch.randn(2, 8))
    assert model.calls == 0


def test_a_branch_that_is_zero_before_training_is_compared_all_the_same(
    monkeypatch: Any,
) -> None:
    from graphprune.shrink import tensors

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.gate * self.outer(self.inner(x)))

    def wrong(tensor: Tensor, layouts: Any, masks: Any) -> Tensor | None:
        result = right(tensor, layouts, masks)
        return None if result is None else result.flip(0)

    right = tensors.slice_tensor
    gp.slim(Branch(), 0.5)
    monkeypatch.setattr(tensors, "slice_tensor", wrong)
    with pytest.raises(gp.VerificationError, match="differs by"):
        gp.slim(Branch(), 0.5, form="module")


@functools.lru_cache
def ramp(size: int) -> Tensor:
    return torch.linspace(0, 1, size)


def test_caches_in_the_code_of_a_model_keep_no_tensor_of_ours(tmp_path: Any) -> None:
    class Ramped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x * ramp(8))

    model, x = Ramped(), torch.randn(2, 8)
    before = model(x)
    ramp.cache_clear()
    for use in (
        lambda: gp.slim(model, 0.5),
        lambda: gp.slim(model, 0.5, x, form="graph"),
        lambda: gp.export(model, x, tmp_path / "ramped.onnx"),
    ):
        use()
        assert torch.equal(model(x), before)
        ramp.cache_clear()


def test_a_model_that_writes_to_its_inputs_leaves_the_examples_as_they_were() -> None:
    class Shifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 16), nn.Linear(16, 3)

        def forward(self, numbers: Tensor, scale: Tensor) -> Tensor:
            numbers.add_(1)
            return self.head(self.embed(numbers) * scale.mul_(2).unsqueeze(-1))

    numbers, scale = torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.float64)
    gp.slim(Shifts().double(), 0.5, (numbers, scale))
    assert torch.equal(numbers, torch.arange(6).view(2, 3))
    assert torch.equal(scale, torch.ones(2, 3, dtype=torch.float64))


def test_a_thousand_layers_are_no_more_than_many() -> None:
    layers = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(1100)]
    model = nn.Sequential(*layers, nn.Linear(16, 4))
    assert gp.count_parameters(gp.slim(model, 0.5, torch.randn(2, 16))) < 1100 * 8 * 10


def test_what_a_model_keeps_of_its_parameters_is_not_copied_into_the_slim_one() -> None:
    """As timm's attention keeps its position biases, until train() or eval() is called."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
            self.kept: dict[str, Tensor] = {}

        def train(self, mode: bool = True) -> Any:
            self.kept = {}
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.kept.setdefault("scale", self.first.bias.exp())
            return self.last(self.first(x) * scale)

    model = Keeps().eval()
    x = torch.randn(2, 6)
    before = model(x)
    for form in ("module", "graph"):
        slimmer = gp.slim(model, 0.5, x, form=form)
        assert slimmer(x).shape == (2, 3)
    assert torch.equal(model(x), before)
    assert model.kept["scale"].shape == (16,)
