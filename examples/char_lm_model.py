"""A character-level language model with LRU blocks, and the text it learns."""

from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kexue_kernels as kk

VOCABULARY = 128  # ASCII: one token is one character

States = list[Tensor]  # one [B, state_dim] for each block


class Block(nn.Module):
    """x + GLU(GELU(LRU(norm(x)))): the recurrence mixes along time, the GLU across channels."""

    def __init__(self, dim: int, state_dim: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.lru = kk.nn.LRU(dim, state_dim, r_max=0.999)
        self.gate = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, dim] and the state before it -> [B, L, dim] and the state after it."""
        y, state = self.lru(self.norm(x), state, return_state=True)
        return x + self._mix(y), state

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The same for one step: x is [B, dim]."""
        y, state = self.lru.step(self.norm(x), state)
        return x + self._mix(y), state

    def _mix(self, y: Tensor) -> Tensor:
        return F.glu(self.gate(F.gelu(y)))


class CharLM(nn.Module):
    """Predicts each next character from all characters before it."""

    def __init__(self, dim: int = 128, state_dim: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.ModuleList(Block(dim, state_dim) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY)

    def initial_states(self, batch: int) -> States:
        return [block.lru.initial_state(batch) for block in self.blocks]

    def forward(self, tokens: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """Logits [B, L, VOCABULARY] for tokens [B, L], and the states to go on from."""
        x, after = self.embed(tokens), []
        states = self.initial_states(len(tokens)) if states is None else states
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block(x, state)
            after.append(state)
        return self.head(self.norm(x)), after

    def step(self, token: Tensor, states: States) -> tuple[Tensor, States]:
        """Logits [B, VOCABULARY] for one token [B] a sequence: constant work and memory."""
        x, after = self.embed(token), []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block.step(x, state)
            after.append(state)
        return self.head(self.norm(x)), after


class Corpus(NamedTuple):
    train: Tensor  # [characters], int64
    held_out: Tensor


def load_corpus(device: torch.device, held_out_share: float = 0.1) -> Corpus:
    """Python's own documentation topics; the last tenth is held out.

    The topics quote each other: every paragraph is kept once, so that no held-out paragraph
    was trained on.
    """
    paragraphs = dict.fromkeys(p for text in topics.values() for p in text.split("\n\n"))
    tokens = encode("\n\n".join(paragraphs), device)
    cut = round(len(tokens) * (1 - held_out_share))
    return Corpus(tokens[:cut], tokens[cut:])


def encode(text: str, device: torch.device) -> Tensor:
    """ASCII codes [characters]; the few characters beyond ASCII become "?"."""
    codes = bytearray(text.encode("ascii", errors="replace"))
    return torch.frombuffer(codes, dtype=torch.uint8).long().to(device)


def decode(tokens: list[int]) -> str:
    """The text of ASCII codes, "?" for a control character other than a line's end."""
    text = bytes(tokens).decode("ascii")
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
