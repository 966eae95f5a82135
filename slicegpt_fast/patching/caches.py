"""The caches of transformers, as a decode program writes into them.

A dynamic cache copies all it holds for every token. Here its keys and values become views of memory with room behind
them. Whoever else changes the cache puts other tensors in their place, and at the next step those are copied into new
room: nothing that a cache ever handed out changes under its holder's feet.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache, StaticLayer

from slicegpt_fast import _C
from slicegpt_fast.architectures import Heads
from slicegpt_fast.kernels.operands import cache as operand

CACHES = (DynamicCache, StaticCache)
LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)
LEAST_ROOM = 64  # tokens


class Room:
    """Memory for keys and values [B, G, C, D], of which a layer of a cache holds the positions first ... end."""

    def __init__(self, keys: Tensor, values: Tensor, end: int) -> None:
        self.keys, self.values = keys, values
        self.first, self.end = 0, end
        self.held: tuple[Any, Any] = (keys, values)  # what the layer of the cache was given

    def holds(self, layer: Any) -> bool:
        """Whether the layer of the cache is as it was left."""
        return layer.keys is self.held[0] and layer.values is self.held[1]

    def hold(self, layer: Any) -> None:
        """Give the layer of the cache the positions first ... end."""
        length = self.end - self.first
        self.held = (self.keys.narrow(2, self.first, length), self.values.narrow(2, self.first, length))
        layer.keys, layer.values = self.held


class RoomsInUse:
    """The rooms of all layers of a run, with ``first``, ``start`` tokens behind it, and memory for ``new`` more."""

    def __init__(self, layers: list[Any], rooms: list[Room], new: int) -> None:
        self._layers, self._rooms, self._new = layers, rooms, new
        self.first = rooms[0].first
        self.start = rooms[0].end - rooms[0].first
        self.fixed = type(layers[0]) is StaticLayer

    def append(self) -> None:
        """Let the caches hold what the program has written."""
        for layer, room in zip(self._layers, self._rooms, strict=True):
            room.end += self._new
            if self.fixed:
                layer.cumulative_length.add_(self._new)
                continue
            if type(layer) is DynamicSlidingWindowLayer:
                layer.cumulative_length += self._new
                room.first = max(room.first, room.end - layer.sliding_window + 1)
            room.hold(layer)


class Rooms:
    """The room of each layer of the caches that a program has met."""

    def __init__(self, heads: Heads, dtype: torch.dtype, program: _C.Program) -> None:
        self._shape = (heads.values, heads.size)
        self._dtype = dtype
        self._program = program
        self._known: WeakKeyDictionary[Any, Room] = WeakKeyDictionary()
        self._bound: list[Any] = []  # weak references to the rooms that the program writes into

    def use(self, cache: Any, indices: list[int], batch: int, new: int) -> RoomsInUse | None:
        """Make room for ``new`` tokens in the layers ``indices`` of a cache and tell the program of it.

        Returns None for a cache that is not one of CACHES in memory, for layers of different types or lengths, or of
        another batch, and where there can be no room.
        """
        if type(cache) not in CACHES or cache.offloading:
            return None
        while len(cache.layers) <= max(indices):
            if cache.layer_class_to_replicate is None:
                return None
            cache.layers.append(cache.layer_class_to_replicate())
        layers = [cache.layers[index] for index in indices]
        if type(layers[0]) not in LAYERS or any(type(layer) is not type(layers[0]) for layer in layers):
            return None
        rooms: list[Room] = []
        for layer in layers:
            room = self._room(layer, batch, new)
            if room is None or (rooms and (room.first, room.end) != (rooms[0].first, rooms[0].end)):
                return None
            rooms.append(room)
        self._bind(rooms)
        return RoomsInUse(layers, rooms, new)

    def _bind(self, rooms: list[Room]) -> None:
        self._bound += [None] * (len(rooms) - len(self._bound))
        for number, room in enumerate(rooms):
            bound = self._bound[number]
            if bound is None or bound() is not room:
                self._program.cache(number, operand(room.keys), operand(room.values))
                self._bound[number] = ref(room)

    def _room(self, layer: Any, batch: int, new: int) -> Room | None:
        if not layer.is_initialized:
            sample = torch.empty(batch, self._shape[0], 0, self._shape[1], dtype=self._dtype)
            layer.lazy_initialization(sample, sample)
        room = self._known.get(layer)
        if room is None or not room.holds(layer) or room.keys.shape[0] != batch:
            room = self._taken_over(layer, batch, new)
            if room is None:
                return None
            self._known[layer] = room
        if type(layer) is StaticLayer:
            room.end = int(layer.cumulative_length)
            return room if room.end + new <= room.keys.shape[2] else None
        if type(layer) is DynamicSlidingWindowLayer and (layer.record_past or layer.sliding_window < 2):
            return None
        if room.end + new > room.keys.shape[2]:
            room = self._known[layer] = self._copied(*room.held, new)
            room.hold(layer)
        return room

    def _taken_over(self, layer: Any, batch: int, new: int) -> Room | None:
        """Room of what somebody else has put into a layer of a cache, or None where that does not fit."""
        if type(layer) is not StaticLayer and layer.keys.numel() == 0 and layer.values.numel() == 0:
            empty = torch.empty(batch, self._shape[0], 0, self._shape[1], dtype=self._dtype)
            return self._copied(empty, empty, new)
        keys: Tensor = layer.keys
        values: Tensor = layer.values
        for x in (keys, values):
            fits = x.dim() == 4 and (x.shape[0], x.shape[1], x.shape[3]) == (batch, *self._shape)
            if not fits or x.dtype != self._dtype or x.device.type != "cpu" or type(x) is not Tensor:
                return None
        if type(layer) is not StaticLayer:
            return self._copied(keys, values, new)
        usable = keys.is_contiguous() and values.is_contiguous() and keys.shape == values.shape
        return Room(keys, values, 0) if usable else None

    def _copied(self, keys: Tensor, values: Tensor, new: int) -> Room:
        batch, groups, length, size = keys.shape
        shape = (batch, groups, max(LEAST_ROOM, 2 * (length + new)), size)
        room = Room(keys.new_empty(shape), values.new_empty(shape), length)
        room.keys[:, :, :length].copy_(keys)
        room.values[:, :, :length].copy_(values)
        room.held = (None, None)
        return room
