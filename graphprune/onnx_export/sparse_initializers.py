"""ONNX files that hold weights by what is not zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_LEAST_BYTES = 1024  # of a weight: smaller ones may stand where a tensor has to be whole


def hold_sparsely(path: Path) -> None:
    """Rewrite a file, alone in its folder but for its weights, with sparse ones where that is smaller."""
    model = onnx.load(path)
    graph, dense_tensors = model.graph, []
    for tensor in graph.initializer:
        sparse = _to_sparse(tensor)
        if tensor.ByteSize() >= _LEAST_BYTES and sparse.ByteSize() < tensor.ByteSize():
            graph.sparse_initializer.append(sparse)
        else:
            dense_tensors.append(tensor)
    del graph.initializer[:]
    graph.initializer.extend(dense_tensors)
    # A value info describes a dense tensor, which a name of a sparse one no longer is.
    kept_infos = [value for value in graph.value_info if value.name not in _names(graph)]
    del graph.value_info[:]
    graph.value_info.extend(kept_infos)
    # The model was loaded with its external weights, and is saved as one file.
    for weights_file in set(path.parent.iterdir()) - {path}:
        weights_file.unlink()
    onnx.save(model, path)


def _to_sparse(tensor: TensorProto) -> onnx.SparseTensorProto:
    """Return a tensor by its numbers that are not zero and their places, which take 3 bytes or so each."""
    array = numpy_helper.to_array(tensor)
    places = np.flatnonzero(array)
    values = numpy_helper.from_array(array.flat[places], tensor.name)
    indices = helper.make_tensor("", TensorProto.INT64, [len(places)], places)
    return helper.make_sparse_tensor(values, indices, array.shape)


def _names(graph: onnx.GraphProto) -> set[str]:
    return {sparse.values.name for sparse in graph.sparse_initializer}
