"""Make most of the weights of recurrent layers zero."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from graphprune.errors import InvalidRequestError
from graphprune.graph_utils.edits import put_parameter
from graphprune.pipeline.pipeline import Pass, Program
from graphprune.rules import arguments_of
from graphprune.rules.recurrent import GATES
from graphprune.sparsity.gradual import Matrix, mask_without_lowest


@dataclass(frozen=True)
class SparseRecurrent(Pass):
    """The blocks of a trained recurrent layer's weights whose largest weight is smallest become zero.

    1. Each matrix, of each layer and direction, loses the same fraction of its blocks, and each row of
       blocks as many, which is what `LowerSparseRecurrent` makes fast. Gates stand one above the other in
       a matrix; no block is in two of them.

    It is the scores and the blocks of `graphprune.GradualSparsity`, which loses less, being part of the
    training. Biases and all other layers are left alone.

    Attributes:
        sparsity: fraction of the blocks of each matrix that become zero, 0 < sparsity < 1.
        block: rows and columns of what goes together.
        balanced: rows of blocks lose as many, and keep one at least; otherwise the lowest of the matrix go.

    """

    sparsity: float = 0.9
    block: tuple[int, int] = (32, 32)
    balanced: bool = True

    def rewrite(self, program: Program) -> bool:
        """Put a sparse matrix in the place of each dense one."""
        if not 0 < self.sparsity < 1 or min(self.block) < 1:
            raise InvalidRequestError(
                f"sparsity={self.sparsity} must be above 0 and below 1, and block={self.block} rows and "
                "columns, 1 or more"
            )
        changed = False
        for node in program.graph_module.graph.nodes:
            packet = getattr(node.target, "overloadpacket", None)
            if packet in GATES:
                reads = arguments_of(node)["params"]
                height = len(program.graph_module.get_parameter(str(reads[0].target)))
                for read in reads:
                    changed |= self._cut(program.graph_module, read, height, GATES[packet])
        return changed

    def _cut(self, graph_module: fx.GraphModule, read: fx.Node, height: int, gates: int) -> bool:
        """Cut one parameter if it is a matrix; say whether it lost anything.

        Gates stand one above the other in the matrices of that height, and not in those of projections.
        """
        weight = graph_module.get_parameter(str(read.target))
        if weight.dim() < 2:
            return False
        name, count = str(read.target), gates if len(weight) == height else 1
        matrix = Matrix(name, nn.Parameter(weight.detach()), "recurrent", count, self.block)
        scores = matrix.scores()
        mask = mask_without_lowest(scores, round(self.sparsity * scores.numel()), self.balanced)
        put_parameter(graph_module, name, weight.detach() * matrix.spread(mask), weight)
        return not bool(mask.all())
