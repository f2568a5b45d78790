"""Small recurrent structures: torch's layers, cells in loops, gates by hand, a selective scan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.structures_registry import both, normal, register, structure

# 7 steps of 20 features
sequence = normal(7, 20)
memory = normal(9, 14, seed=2)


class Recurrent(nn.Module):
    """Two linear layers around a recurrent one, whose output is read at every step."""

    def __init__(self, layer: nn.RNNBase, features: int) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(20, 14), layer, nn.Linear(features, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x).relu())[0])


def recurrent(name: str, kind: type[nn.RNNBase], features: int = 12, **options: object) -> None:
    options = {"batch_first": True} | options
    register(name, lambda: Recurrent(kind(14, 12, **options), features), sequence)


recurrent("lstm", nn.LSTM)
recurrent("lstm_two_layers", nn.LSTM, num_layers=2)
recurrent("lstm_bidirectional", nn.LSTM, 24, bidirectional=True)
recurrent("lstm_two_layers_bidirectional", nn.LSTM, 24, num_layers=2, bidirectional=True)
recurrent("lstm_no_bias", nn.LSTM, bias=False)
recurrent("lstm_projected", nn.LSTM, 5, proj_size=5)
recurrent("lstm_time_first", nn.LSTM, batch_first=False)
recurrent("gru", nn.GRU)
recurrent("gru_two_layers_bidirectional", nn.GRU, 24, num_layers=2, bidirectional=True)
recurrent("gru_time_first", nn.GRU, batch_first=False, num_layers=2)
recurrent("rnn_tanh", nn.RNN)
recurrent("rnn_relu_bidirectional", nn.RNN, 24, nonlinearity="relu", bidirectional=True)


@structure(sequence)
class LstmZeroState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(20, 12, 2, batch_first=True), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        h, c = torch.zeros(2, x.size(0), 12), torch.zeros(2, x.size(0), 12)
        return self.last(self.lstm(x, (h, c))[0][:, -1])


@structure(sequence)
class GruLearnedState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.last = nn.GRU(20, 12, batch_first=True), nn.Linear(12, 6)
        self.state = nn.Parameter(torch.empty(1, 1, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gru(x, self.state.expand(-1, x.size(0), -1).contiguous())[1][0])


@structure(both(sequence, memory))
class EncoderDecoder(nn.Module):
    """The last state of one GRU is the first of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(20, 12, batch_first=True)
        self.decoder = nn.GRU(14, 12, batch_first=True)
        self.last = nn.Linear(12, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        _, state = self.encoder(x)
        return self.last(self.decoder(y, state)[0])


@structure(sequence)
class LstmBothDirections(nn.Module):
    """The two directions are taken apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = (
            nn.LSTM(20, 12, batch_first=True, bidirectional=True),
            nn.Linear(12, 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        return self.last(y[:, -1, :12] + y[:, 0, 12:])


@structure(sequence)
class LstmResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(20, 12), nn.LayerNorm(12)
        self.a, self.b = nn.LSTM(12, 12, batch_first=True), nn.LSTM(12, 12, batch_first=True)
        self.last = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.a(x)[0]
        return self.last(x + self.b(self.norm(x))[0])


@structure(sequence)
class LstmWithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(20, 12, batch_first=True), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, _) = self.lstm(x)
        weights = torch.bmm(y, h[-1].unsqueeze(2)).softmax(1)
        return self.last(torch.cat([(weights * y).sum(1), h[-1]], 1))


@structure(normal(6, 11))
class ConvolutionThenGru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gru = nn.Conv1d(6, 14, 3), nn.GRU(14, 12, batch_first=True)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().transpose(1, 2)
        return self.last(self.gru(x)[0].amax(1))


@structure(sequence)
class LstmCellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.LSTMCell(20, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(0), 12)
        for t in range(7):
            h, c = self.cell(x[:, t], (h, c))
        return self.last(h)


@structure(sequence)
class GruCellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRUCell(20, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros(x.size(0), 12), []
        for step in torch.unbind(x, 1)[:4]:
            h = self.cell(step, h)
            outputs.append(self.last(h))
        return torch.stack(outputs, 1)


@structure(sequence)
class RnnByHand(nn.Module):
    """Gates written out: one matrix for three gates, chunked."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.state = nn.Linear(20, 36), nn.Linear(12, 36, bias=False)
        self.last = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), 12)
        for t in range(5):
            r, z, n = self.input(x[:, t]).chunk(3, -1)
            hr, hz, hn = self.state(h).chunk(3, -1)
            r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
            h = (1 - z) * torch.tanh(n + r * hn) + z * h
        return self.last(h)


@structure(sequence)
class StateSpace(nn.Module):
    """A selective scan as Mamba writes it: gate, short convolution, state per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(20, 48), nn.Linear(24, 20)
        self.conv = nn.Conv1d(24, 24, 3, padding=2, groups=24)
        self.select, self.step = nn.Linear(24, 5 + 2 * 3, bias=False), nn.Linear(5, 24)
        self.decay, self.skip = nn.Parameter(torch.empty(24, 3)), nn.Parameter(torch.empty(24))

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.inward(x).chunk(2, dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : x.size(1)]).transpose(1, 2)
        step, b, c = self.select(x).split([5, 3, 3], dim=-1)
        step = F.softplus(self.step(step))
        kept = torch.exp(-step[..., None] * self.decay.abs())
        added = step[..., None] * b[:, :, None] * x[..., None]
        state, outputs = torch.zeros_like(added[:, 0]), []
        for t in range(7):
            state = kept[:, t] * state + added[:, t]
            outputs.append((state * c[:, t, None]).sum(-1))
        y = torch.stack(outputs, 1) + x * self.skip
        return self.outward(y * F.silu(gate))


@structure(both(sequence, lambda: (torch.tensor([4, 7]),)))
class PackedSequences(nn.Module):
    """Sequences of different lengths, packed through a GRU and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(20, 14, 2, batch_first=True, bidirectional=True)
        self.lstm, self.last = nn.LSTM(28, 12, batch_first=True), nn.Linear(12, 6)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = self.lstm(self.gru(packed)[0])
        return self.last(pad_packed_sequence(y, batch_first=True, total_length=7)[0]).relu()
