"""Keys and values of the tokens so far, so that a new token costs one row of work instead of the whole sequence again."""
import numpy as np

from tinyllm.backend import array_module
from tinyllm.tensor import Tensor


class LayerCache:
    """One block's keys and values, oldest first, in buffers with room at the end.     (B, G, capacity, D) each"""

    def __init__(self, keys, values, window):
        self.keys, self.values, self.window, self.used = keys, values, window, 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Add T new positions; all keys and values that queries may look at, and the first new one's index among them.

        RuntimeError while gradients are recorded: they could not reach the keys and values of earlier calls.
        """
        if k.requires_grad or v.requires_grad:
            raise RuntimeError("a key/value cache carries no gradients: call the model with a cache under no_grad()")
        start = self.reserve(k.shape[2])
        self.keys[:, :, start : self.used] = k.data
        self.values[:, :, start : self.used] = v.data
        return Tensor(self.keys[:, :, : self.used]), Tensor(self.values[:, :, : self.used]), start

    def reserve(self, new: int) -> int:
        """Make room for this many positions at the end, to be written by the caller; the first one's index."""
        if self.used + new > self.keys.shape[2]:
            self._make_room(new)
        self.used += new
        return self.used - new

    def _make_room(self, new):
        """Keep the newest window - 1 positions, the most that the next query can see, and drop the rest."""
        kept = min(self.used, self.window - 1)
        xp = array_module(self.keys)
        capacity = max(self.keys.shape[2], kept + new)
        for name in ("keys", "values"):
            old = getattr(self, name)
            fresh = xp.empty((*old.shape[:2], capacity, old.shape[3]), dtype=old.dtype)
            fresh[:, :, :kept] = old[:, :, self.used - kept : self.used]
            setattr(self, name, fresh)
        self.used = kept


class KVCache:
    """The caches of all blocks, and where each row stands.

    length : positions seen so far, dropped ones included.   left_padding : (B,) how many of each row's first positions are padding,
    so that prompts of different lengths can end together; None where no row has any.
    Without a window the cache ends after `capacity` positions, and adding more is a ValueError; with one it rolls, and never ends.
    """

    def __init__(self, xp, layers, batch, kv_heads, head_width, capacity, window, dtype, left_padding=None):
        self.length, self.capacity, self.window = 0, capacity, window
        self.left_padding = None if left_padding is None else np.asarray(left_padding)
        if capacity < 1:
            raise ValueError(f"a key/value cache needs room for at least 1 position, got {capacity}")
        if left_padding is not None and (self.left_padding.shape != (batch,) or (self.left_padding < 0).any()):
            raise ValueError(f"left_padding is how many positions to hide in each of {batch} rows, got {left_padding}")
        room = xp.empty((layers, 2, batch, kv_heads, capacity, head_width), dtype=dtype)  # in one piece: the system hands it out in fewer pages
        self.layers = [LayerCache(keys, values, window) for keys, values in room]

    def check_room(self, rows: int, new: int) -> None:
        """Raise ValueError unless `new` positions of this many rows can be added."""
        if rows != len(self.layers[0].keys):
            raise ValueError(f"the key/value cache is for {len(self.layers[0].keys)} rows, got {rows}")
        if self.window is None and self.length + new > self.capacity:
            raise ValueError(f"the key/value cache holds {self.capacity} positions, {self.length} are used, and {new} more do not fit")

    def padding_mask(self, keys: int, new: int):
        """True where a key is a real token, for the newest `keys` positions once `new` have been added.     -> (B, S) bool or None"""
        if self.left_padding is None:
            return None
        positions = self.length + new - keys + np.arange(keys)
        return array_module(self.layers[0].keys).asarray(positions[None, :] >= self.left_padding[:, None])

    def reorder(self, rows) -> None:
        """Make row b a copy of what was row rows[b] (beam search keeps some rows, drops others)."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        if self.left_padding is not None:
            self.left_padding = self.left_padding[rows]
