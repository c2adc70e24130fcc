"""A reducer that diffusers' own `set_attn_processor` put on every layer of a model."""

from __future__ import annotations

from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0, AttnProcessor2_0
from torch import Tensor

from gen_turbo.contract import Frame, Site, TokenReducer

_PLAIN, _ADDED = AttnProcessor2_0(), AttnAddedKVProcessor2_0()


def bare_call(
    reducer: TokenReducer,
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    temb: Tensor | None,
) -> Tensor:
    """Runs one layer with a fresh plan, copying back.

    A layer that is called alone knows neither grid nor step, so neighbours are those of the sequence and nothing is
    remembered. Cross-attention and layers with added keys run as with diffusers' default processors.
    """
    if attn.added_kv_proj_dim is not None:
        output: Tensor = _ADDED(attn, hidden_states, encoder_hidden_states, attention_mask)
        return output
    is_self = encoder_hidden_states is None and attention_mask is None and hidden_states.ndim == 3
    if not is_self or reducer.ratio == 0:
        output = _PLAIN(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return output
    plan = reducer.plan(hidden_states, Site("", reducer.ratio), Frame())
    output = plan.unmerge(_PLAIN(attn, plan.merge(hidden_states), None, None, temb))
    return output
