"""Input embeddings: a frozen base table, with trained rows for the new words laid over it.

Shapes: B batch, T tokens, D hidden size, V rows of the base table (padding rows included), N new rows.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class WakeOverlay(nn.Module):
    """Look ids up in the base table, or in the trained rows where id >= first_new_id.

    The base table is neither a parameter nor a buffer and is never copied: `state_dict()` holds the rows alone, and
    `.to()` leaves the table where it is. It may lie in host memory while the rows are on the GPU; then pass `ids_BT`
    on the host too, otherwise the look-up waits for the GPU to hand them over.
    """

    def __init__(self, base_VD: Tensor, rows_ND: nn.Parameter, first_new_id: int) -> None:
        assert base_VD.shape[1] == rows_ND.shape[1], f"base {tuple(base_VD.shape)}, rows {tuple(rows_ND.shape)}"
        assert 0 < first_new_id <= base_VD.shape[0], f"first new id {first_new_id} of {base_VD.shape[0]} base rows"
        super().__init__()
        # detach: a Parameter would be registered here, and so be moved, saved and counted as trainable.
        self.base_VD = base_VD.detach()
        self.rows_ND = rows_ND
        self.first_new_id = first_new_id

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return embeds_BTD in the base table's dtype, on the rows' device.

        Ids are 0 .. first_new_id + N - 1. The rows' gradient is sparse, one entry for each token: an old token's
        entry is exactly zero and names some row of no meaning (spread out, so that they do not all meet in one).
        """
        device = self.rows_ND.device
        base_BTD = self._base(ids_BT, device)
        ids_BT = to_device(ids_BT, device)
        new_BT = ids_BT >= self.first_new_id
        row_ids_BT = torch.where(new_BT, ids_BT - self.first_new_id, ids_BT % self.rows_ND.shape[0])
        rows_BTD = functional.embedding(row_ids_BT, self.rows_ND, sparse=True).to(base_BTD.dtype)
        return torch.where(new_BT.unsqueeze(-1), rows_BTD, base_BTD)

    def _base(self, ids_BT: Tensor, device: torch.device) -> Tensor:
        """Return the base rows, row 0 for a new word, on a device."""
        ids_BT = torch.where(ids_BT >= self.first_new_id, 0, ids_BT).to(self.base_VD.device)
        shape = (*ids_BT.shape, self.base_VD.shape[1])
        pinned = device.type == "cuda" and not self.base_VD.is_cuda
        base_KD = torch.empty(
            ids_BT.numel(), shape[-1], dtype=self.base_VD.dtype, device=ids_BT.device, pin_memory=pinned
        )
        torch.index_select(self.base_VD, 0, ids_BT.flatten(), out=base_KD)
        return base_KD.view(shape).to(device, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from the host without waiting for what the device has to do first."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
