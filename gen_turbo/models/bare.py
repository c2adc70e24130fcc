"""A reducer that diffusers' own `set_attn_processor` put on every layer of a model."""

from __future__ import annotations

from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0, AttnProcessor2_0
from torch import Tensor

from gen_turbo.method import LayerInfo, StepInfo, TokenReducer

_PLAIN, _ADDED = AttnProcessor2_0(), AttnAddedKVProcessor2_0()
_NEEDS_ATTACH = ("kv_only", "proportional_attention", "text_ratio", "attention_backend", "layer_ratios", "step_scale")


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

    Raises:
        TypeError: If the layer is of a kind, or a setting needs what, only `attach` can handle.
    """
    _check(reducer, attn)
    if attn.added_kv_proj_dim is not None:
        output: Tensor = _ADDED(attn, hidden_states, encoder_hidden_states, attention_mask)
        return output
    is_self = encoder_hidden_states is None and attention_mask is None and hidden_states.ndim == 3
    if not is_self or reducer.ratio == 0:
        output = _PLAIN(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return output
    plan = reducer.plan(hidden_states, LayerInfo("", reducer.ratio), StepInfo())
    output = plan.unmerge(_PLAIN(attn, plan.merge(hidden_states), None, None, temb))
    return output


def _check(reducer: TokenReducer, attn: Attention) -> None:
    name = type(reducer).__name__
    needs = [setting for setting in _NEEDS_ATTACH if getattr(reducer, setting)]
    if needs or reducer.scope != "attention":
        settings = ", ".join(needs) or "scope='block'"
        raise TypeError(f"{settings} of {name} needs gen_turbo.attach(model, processor) instead of set_attn_processor")
    is_plain = isinstance(attn, Attention) and attn.norm_q is None
    if not is_plain or (attn.added_kv_proj_dim is not None and attn.group_norm is None):
        raise TypeError(
            f"{name} alone cannot run {type(attn).__name__} with text or positions in it; use "
            "gen_turbo.attach(model, processor) instead of the model's set_attn_processor"
        )
