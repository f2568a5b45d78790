"""Recurrent and linear layers that are zero but for some blocks, packed and run without the rest."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from graphprune.passes import LowerSparseLinear, LowerSparseRecurrent, SparseRecurrent
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, library, nn

import graphprune as gp
from graphprune.onnx_export.providers import Runtime, open_session
from graphprune.ops.block_packing import Packed, find_block, product
from graphprune.ops.block_sparse_recurrent import GATES, OPERATOR, block_sparse_recurrent
from graphprune.ops.onnx_scan import TRANSLATIONS
from graphprune.runtime.autotune.packed import LinearShape, MatrixShape, RecurrentShape

KINDS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn_tanh": nn.RNN}


def blocks_on(gates: int, height: int, width: int, block: tuple[int, int], seed: int) -> Tensor:
    """A mask, `[gates * height, width]`, of which about a third of the blocks is on."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = block
    on = torch.rand(gates, -(-height // rows), -(-width // columns), generator=generator) < 0.35
    spread = on.repeat_interleave(rows, 1)[:, :height].repeat_interleave(columns, 2)
    return spread[:, :, :width].flatten(0, 1)


def cut(model: nn.Module, block: tuple[int, int] = (8, 4)) -> nn.Module:
    """Make most of its recurrent and linear weights zero, in blocks."""
    schedule = gp.GradualSparsity(
        model, start=0, end=2, every=1, schedule="hard", sparsity=0.75, block=block, balanced=True
    )
    for _ in range(2):
        schedule.step()
    return model.eval()


class Reader(nn.Module):
    """A recurrent network between an embedding and a classifier."""

    def __init__(self, kind: Any = nn.GRU, classes: int = 16, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16)
        self.recurrent = kind(16, 32, batch_first=True, **options)
        width = 64 if options.get("bidirectional") else 32
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Any]:
        output, last = self.recurrent(self.embedding(tokens))
        return self.head(output), last


def tokens(batch: int = 3, length: int = 5) -> Tensor:
    return torch.randint(20, (batch, length), generator=torch.Generator().manual_seed(1))


def calls(graph: fx.GraphModule, name: str) -> int:
    return sum(name in str(node.target) for node in graph.graph.nodes if node.op != "get_attr")


def same(one: nn.Module, other: nn.Module, *inputs: Any) -> None:
    torch.testing.assert_close(other(*inputs), one(*inputs), rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------- packing


@given(
    gates=st.integers(1, 4),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    seed=st.integers(0, 999),
)
@settings(max_examples=300, deadline=None)
def test_a_packed_matrix_multiplies_as_the_whole_one(
    gates: int, height: int, width: int, rows: int, columns: int, seed: int
) -> None:
    mask = blocks_on(gates, height, width, (rows, columns), seed)
    matrix = torch.randn(gates * height, width, dtype=torch.float64) * mask
    data = torch.randn(width, 3, dtype=torch.float64)
    found = find_block(matrix, gates)
    assert height <= rows or found[0] % min(rows, height) == 0 or found[0] == height
    for block in (found, (rows, columns), (4, 7)):
        packed = Packed.of(matrix, gates, block)
        made = product(packed.blocks, packed.places, data).unflatten(0, (gates, -1))[:, :height]
        torch.testing.assert_close(made.flatten(0, 1), matrix @ data)


@pytest.mark.parametrize("block", [(8, 4), (16, 1), (4, 24), (48, 2)])
def test_blocks_are_found_from_zeros(block: tuple[int, int]) -> None:
    assert find_block(torch.ones(96, 24) * blocks_on(2, 48, 24, block, 0), 2) == block


def test_blocks_of_a_matrix_as_many_in_each_row_take_no_more_than_what_is_on() -> None:
    model = cut(nn.GRU(64, 64), (16, 16))
    packed = Packed.of(model.weight_hh_l0.detach(), 3, (16, 16))
    assert packed.blocks.shape == (12, 16, 16)
    assert packed.blocks.numel() == int((model.weight_hh_l0 != 0).sum())


# -------------------------------------------------------------------------------------- operator


def arguments_of(
    kind: str, *, packed: bool = True, hidden: int = 20
) -> tuple[nn.Module, list[Any]]:
    """A layer of torch.nn and what the operator takes for it on five steps of three sequences."""
    torch.manual_seed(0)
    layer = KINDS[kind](12, hidden).double()
    gates, given = GATES[kind], []
    for at, weight in enumerate((layer.weight_ih_l0, layer.weight_hh_l0)):
        with torch.no_grad():
            weight.mul_(blocks_on(gates, hidden, weight.shape[1], (8, 4), at))
        whole = Packed.of(weight.detach(), gates, (8, 4))
        given += [whole.blocks, whole.places] if packed else [weight.detach().clone(), None]
    given += [layer.bias_ih_l0.detach().clone(), layer.bias_hh_l0.detach().clone()]
    data = torch.randn(5, 12, 3, dtype=torch.float64)
    states = [torch.randn(hidden, 3, dtype=torch.float64) for _ in range(1 + (kind == "lstm"))]
    return layer, [data, states, *given, kind, False]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("packed", [True, False])
def test_the_operator_is_the_layer(kind: str, packed: bool) -> None:
    layer, (data, states, *others) = arguments_of(kind, packed=packed)
    first = tuple(state.t()[None] for state in states)
    wanted, last = layer(data.transpose(1, 2), first if kind == "lstm" else first[0])
    output, *found = block_sparse_recurrent(data, states, *others)
    torch.testing.assert_close(output.transpose(1, 2), wanted)
    lasts = last if kind == "lstm" else [last]
    torch.testing.assert_close([state.t()[None] for state in found], list(lasts))
    *others, _ = others
    backwards, *_ = block_sparse_recurrent(data.flip(0), states, *others, True)
    torch.testing.assert_close(backwards.flip(0), output)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("packed", [True, False])
def test_the_operator_is_one_that_torch_can_trace_and_differentiate(
    kind: str, packed: bool
) -> None:
    _, given = arguments_of(kind, packed=packed)
    for at in (0, 2, 4, 6, 7):
        given[at] = given[at].requires_grad_()
    library.opcheck(block_sparse_recurrent, tuple(given))
    data, states, *others = given

    def output(value: Tensor, blocks: Tensor) -> Tensor:
        return block_sparse_recurrent(value, states, blocks, *others[1:])[0]

    assert torch.autograd.gradcheck(output, (data, others[0]))


# -------------------------------------------------------------------------------------- lowering


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
    ],
)
def test_recurrent_layers_compute_what_they_did(kind: Any, options: Any) -> None:
    model = cut(Reader(kind, **options)).double()
    graph, changed = LowerSparseRecurrent(measured=False)(model, tokens())
    assert changed
    assert calls(graph, "block_sparse_recurrent") == (4 if options.get("num_layers") else 1)
    assert not any(name.split(".")[-1] == "weight_hh_l0" for name, _ in graph.named_parameters())
    for batch, length in ((3, 5), (1, 1), (4, 9)):
        same(model, graph, tokens(batch, length))
    matrices = sum(w.numel() for name, w in model.named_parameters() if "recurrent.weight" in name)
    assert gp.count_parameters(model) - gp.count_parameters(graph) == 0.75 * matrices
    recurrent = gp.count_macs(model.recurrent, torch.zeros(3, 5, 16, dtype=torch.float64))
    saved = gp.count_macs(model, tokens()) - gp.count_macs(graph, tokens())
    assert saved == 0.75 * recurrent


def test_time_first_given_states_and_a_relu() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.RNN(24, 32, nonlinearity="relu")

        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            output, last = self.recurrent(x, state)
            return output.mean(0) + last[0]

    model = cut(Plain()).double()
    x, state = (torch.randn(*s, dtype=torch.float64) for s in ((5, 3, 24), (1, 3, 32)))
    graph, _ = LowerSparseRecurrent(measured=False)(model, (x, state))
    same(model, graph, x, state)
    same(model, graph, x[:2], state)


@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_compute_what_they_did(shape: Any, bias: bool) -> None:
    model = cut(nn.Sequential(nn.Linear(24, 36, bias=bias), nn.ReLU(), nn.Linear(36, 7)), (8, 4))
    model.double()
    x = torch.randn(shape, dtype=torch.float64)
    graph, changed = LowerSparseLinear(measured=False, block=(8, 4))(model, x)
    assert changed
    assert calls(graph, "aten.linear") == 0
    same(model, graph, x)
    same(model, graph, torch.cat([x, x]))


def test_a_layer_that_is_called_twice_is_packed_once() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.GRU(24, 32, batch_first=True)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.recurrent(a)[0] + self.recurrent(b)[0]

    model = cut(Twins()).double()
    inputs = tuple(torch.randn(2, 5, 24, dtype=torch.float64) for _ in range(2))
    graph, _ = LowerSparseRecurrent(measured=False)(model, inputs)
    assert calls(graph, "block_sparse_recurrent") == 2
    assert sum(name.endswith("_blocks") for name, _ in graph.named_parameters()) == 2
    same(model, graph, *inputs)


class Odd(nn.Module):
    """A projection and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.projected = nn.LSTM(16, 32, proj_size=16, batch_first=True)
        self.cell = nn.GRUCell(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.projected(x)[0][:, 0])


@pytest.mark.parametrize("model", [Odd(), Reader(), nn.Sequential(nn.Linear(8, 8))])
def test_what_is_not_to_be_lowered_stays(model: nn.Module) -> None:
    if isinstance(model, Odd):
        cut(model)
    x: Any = {Odd: torch.randn(2, 4, 16), Reader: tokens()}.get(type(model), torch.randn(2, 8))
    for lower in (LowerSparseRecurrent(measured=False), LowerSparseLinear(measured=False)):
        assert not lower(model.eval(), x).modified


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_form_is_taken(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def times(self: Any, _: Any) -> dict[str, float]:
        asked.append(self)
        return {"dense": 2.0, "packed": 1.0 if faster else 3.0}

    monkeypatch.setattr(RecurrentShape, "times", times)
    monkeypatch.setattr(LinearShape, "times", times)
    model, text = cut(Reader(bidirectional=True)), "lower-sparse-recurrent, lower-sparse-linear"
    pipeline = gp.Pipeline.parse(text)
    if faster:
        graph = pipeline(model, tokens())
    else:
        with (
            pytest.warns(gp.GraphPruneWarning, match="recurrent layers that run no faster on cpu"),
            pytest.warns(gp.GraphPruneWarning, match="linear layers that run no faster on cpu"),
        ):
            graph = pipeline(model, tokens())
    assert calls(graph, "block_sparse_recurrent") == (2 if faster else 0)
    assert calls(graph, "aten.bmm") == (1 if faster else 0)
    assert calls(graph, "aten.gru") == (0 if faster else 1)
    (cell,) = {shape for shape in asked if isinstance(shape, RecurrentShape)}
    assert (cell.time, cell.batch, cell.hidden.blocks) == (5, 3, (12, 8, 8))
    (linear,) = {shape for shape in asked if isinstance(shape, LinearShape)}
    assert (linear.count, linear.matrix.columns) == (15, 64)


@pytest.mark.parametrize("kind", [*KINDS, "rnn_relu"])
def test_both_forms_are_measured(kind: str) -> None:
    """They run in ONNX Runtime; how fast is for the benchmarks."""
    rows = 32 * GATES[kind]
    whole = MatrixShape(rows, 10)
    packed = MatrixShape.of(
        torch.zeros(rows, 32), Packed.of(torch.zeros(rows, 32), GATES[kind], (20, 8))
    )
    shape = RecurrentShape(kind, 3, 2, whole, packed, biases=kind != "gru")
    for times in (shape.times(Runtime()), LinearShape(6, packed).times(Runtime())):
        assert set(times) == {"dense", "packed"}
        assert min(times.values()) > 0


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_the_file_has_standard_operators_and_any_length_and_batch(
    kind: Any, tmp_path: Path
) -> None:
    model = cut(Reader(kind, num_layers=2, bidirectional=True, classes=12))
    lowering = gp.Pipeline(
        [LowerSparseRecurrent(measured=False), LowerSparseLinear(measured=False)]
    )
    graph = lowering(model, tokens())
    exported = gp.export(graph, tokens(), tmp_path / "net.onnx", free={"tokens": {1: "length"}})
    assert set(exported.free) == {"batch", "length"}
    file = onnx.load(exported.path)
    assert {node.domain for node in file.graph.node} == {""}
    assert [node.op_type for node in file.graph.node].count("Scan") == 4
    onnx.checker.check_model(file, full_check=True)
    session = open_session(exported.path)
    for batch, length in ((1, 1), (2, 7), (5, 3)):
        found = session.run(None, exported.feed(tokens(batch, length)))
        wanted = torch.utils._pytree.tree_leaves(model(tokens(batch, length)))
        torch.testing.assert_close([torch.from_numpy(a) for a in found], wanted)


def test_an_exported_program_stays_one_that_torch_exports(tmp_path: Path) -> None:
    model = cut(Reader())
    program = torch.export.export(model, (tokens(),), dynamic_shapes=({0: torch.export.Dim("n")},))
    lowered = gp.Pipeline([LowerSparseRecurrent(measured=False)])(program)
    assert isinstance(lowered, torch.export.ExportedProgram)
    torch.testing.assert_close(lowered.module()(tokens(4)), model(tokens(4)))
    written = torch.onnx.export(lowered, dynamo=True, custom_translation_table=TRANSLATIONS)
    written.save(tmp_path / "net.onnx")
    session = open_session(tmp_path / "net.onnx")
    (found, _) = session.run(None, {session.get_inputs()[0].name: tokens(4).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(tokens(4))[0])


def test_names_that_a_scan_uses_are_the_users_to_use(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.GRU(24, 32, batch_first=True)

        def forward(self, graphprune_step_0: Tensor) -> Tensor:
            return self.recurrent(graphprune_step_0)[0]

    x = torch.randn(2, 5, 24)
    graph, _ = LowerSparseRecurrent(measured=False)(cut(Named()), x)
    exported = gp.export(graph, x, tmp_path / "net.onnx")
    assert exported.inputs == ("graphprune_step_0",)


def test_a_file_shrinks_as_the_weights_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.GRU(320, 320, batch_first=True))
    x = torch.randn(1, 4, 320)
    pruned = gp.Pipeline(
        [SparseRecurrent(sparsity=0.9, block=(32, 32)), LowerSparseRecurrent(measured=False)]
    )
    sizes = [gp.export(each, x, tmp_path / "net.onnx").bytes for each in (model, pruned(model, x))]
    assert sizes[1] < 0.13 * sizes[0]


def test_zeros_that_stand_alone_make_the_file_smaller_if_asked(tmp_path: Path) -> None:
    model = Reader(num_layers=2)
    schedule = gp.GradualSparsity(model, start=0, end=2, every=1, schedule="hard", sparsity=0.9)
    for _ in range(2):
        schedule.step()
    model.eval()
    dense = gp.export(model, tokens(), tmp_path / "dense.onnx")
    sparse = gp.export(model, tokens(), tmp_path / "sparse.onnx", sparse_weights=True)
    assert sparse.bytes < 0.5 * dense.bytes
    assert sparse.difference <= 1e-6
    file = onnx.load(sparse.path)
    onnx.checker.check_model(file)
    assert len(file.graph.sparse_initializer) >= 5
    with pytest.warns(gp.GraphPruneWarning, match="zeros of recurrent layers stand alone"):
        assert not LowerSparseRecurrent(measured=False)(model, tokens()).modified


def test_it_pickles_compiles_and_trains_on() -> None:
    model = cut(Reader())
    graph, _ = LowerSparseRecurrent(measured=False)(model, tokens())
    sink = io.BytesIO()
    torch.save(graph, sink)
    sink.seek(0)
    torch.testing.assert_close(torch.load(sink, weights_only=False)(tokens()), model(tokens()))
    compiled = torch.compile(graph, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens()), model(tokens()))
    before = graph(tokens())[0].square().mean()
    optimiser = torch.optim.SGD(graph.parameters(), lr=0.1)
    for _ in range(5):
        optimiser.zero_grad()
        graph(tokens())[0].square().mean().backward()
        optimiser.step()
    assert graph(tokens())[0].square().mean() < 0.9 * before


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_it_runs_and_trains_on_a_gpu(kind: Any) -> None:
    model = cut(Reader(kind, num_layers=2, bidirectional=True)).cuda()
    letters = tokens().cuda()
    graph, changed = LowerSparseRecurrent(measured=False)(model, letters)
    assert changed
    found = graph(letters)[0]
    torch.testing.assert_close(found, model(letters)[0], rtol=1e-4, atol=1e-4)
    found.square().mean().backward()
    blocks = [weight for name, weight in graph.named_parameters() if name.endswith("_blocks")]
    assert len(blocks) == 8
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in blocks)


def test_the_dependency_graph_says_what_a_packed_layer_holds() -> None:
    graph, _ = LowerSparseRecurrent(measured=False)(cut(Reader()), tokens())
    found = gp.analyze(graph, tokens())
    reasons = {fixed.reason.why for fixed in found.fixed if "_blocks" in fixed.parameter}
    assert reasons == {"a recurrent layer whose blocks are packed"}
    assert OPERATOR.default in {step.func for step in found.inference.steps}
