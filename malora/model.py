"""The PEFT tuner that adapts the linear layers of a model.

It saves and loads through PEFT.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from malora.config import MaloraConfig
from malora.forward_hooks import AUX_LOSS_WEIGHT, ForwardHooks
from malora.fused.fp8_linear import restore_linear
from malora.fused.group import PROJECTION_GROUPS, ProjectionGroup
from malora.layer import PREFIX, MaloraLayer
from malora.routing import RoutingLog

_LLAMA_LIKE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]

# The paper's targets, Q, K, V, Up, Down and Gate, under the names that each `model_type` uses. Without the attention's
# output: with it the paper's parameter shares do not come out.
TARGET_MODULES: dict[str, list[str]] = {
    **dict.fromkeys(
        ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2"],
        _LLAMA_LIKE,
    ),
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["q_proj", "k_proj", "v_proj", "fc1", "fc2"],
}


class MaloraModel(BaseTuner):
    """A model whose targeted `nn.Linear` modules have experts.

    `peft.get_peft_model` makes it.

    Raises:
        ValueError: a target matches no module, or one that is not an `nn.Linear`; the message names what there is.
    """

    prefix = PREFIX
    tuner_layer_cls = MaloraLayer
    target_module_mapping = TARGET_MODULES

    @property
    def routing_log(self) -> RoutingLog:
        """Routing of the model's last forward pass."""
        return ForwardHooks.on(self.model).log

    @cached_property
    def malora_layers(self) -> list[MaloraLayer]:
        """All adapted layers, in the order of the model's modules."""
        return [module for module in self.model.modules() if isinstance(module, MaloraLayer)]

    @cached_property
    def _groups(self) -> list[ProjectionGroup]:
        return list(dict.fromkeys(layer.group for layer in self.malora_layers))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; see `peft.tuners.tuners_utils.BaseTuner.inject_adapter`."""
        saved = tuple(getattr(self.peft_config[adapter_name], "modules_to_save", None) or ())
        for name, module in model.named_modules():
            if name.endswith(saved):  # PEFT copies them with their attributes
                restore_linear(module)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        hooks = ForwardHooks.on(model)
        hooks.forget_layers()
        weights = (getattr(config, AUX_LOSS_WEIGHT, 0) for config in self.peft_config.values())
        hooks.announce_aux_loss(model, next(filter(None, weights), 0))

    def unload(self) -> nn.Module:
        """Return the base model without adapters."""
        groups = self._groups  # found in the layers, which are about to be removed
        return _restore_base_model(super().unload(), groups)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the base model with its adapters merged. Arguments are PEFT's.

        Raises:
            ValueError: an adapter has a router, or a merged weight would not be finite (`safe_merge`).
        """
        groups = self._groups
        return _restore_base_model(super().merge_and_unload(*args, **kwargs), groups)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep frozen factors frozen.

        PEFT 0.21.2 makes new parameters here, all of them trainable.
        """
        trains = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trains[name])

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Refuse targets that match nothing, before PEFT replaces anything."""
        assert isinstance(peft_config, MaloraConfig)
        targets = peft_config.target_modules
        if isinstance(targets, str) or targets is None:
            return  # a regular expression, or "all-linear"; PEFT says so if it matches nothing
        linear = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | MaloraLayer)
        } - {"base_layer"}
        names = [name for name, _ in model.named_modules()]
        missing = [t for t in sorted(targets) if not any(name == t or name.endswith(f".{t}") for name in names)]
        if missing:
            raise ValueError(
                f"target_modules {missing} match nothing in this {type(model).__name__}. "
                f"Its linear modules are called {sorted(linear)}; name some of these."
            )

    @cached_property
    def _groups_by_parent(self) -> dict[tuple[str, int], ProjectionGroup]:
        return {}

    def _group_of(self, key: str) -> ProjectionGroup:
        """Return the group of the module of this name.

        A module that reads an input of its own gets a group of its own.
        """
        parent, _, name = key.rpartition(".")
        number = next((i for i, names in enumerate(PROJECTION_GROUPS) if name in names), None)
        if number is None:
            return ProjectionGroup()
        return self._groups_by_parent.setdefault((parent, number), ProjectionGroup())

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, MaloraConfig)
        for cached in ("malora_layers", "_groups"):
            self.__dict__.pop(cached, None)
        restore_linear(target)
        if isinstance(target, MaloraLayer):
            target.update_layer(adapter_name, peft_config)
        elif isinstance(target, nn.Linear):
            layer = MaloraLayer(target, current_key, self.routing_log, self._group_of(current_key))
            layer.set_adapter(self.active_adapters)
            layer.update_layer(adapter_name, peft_config)
            self._replace_module(parent, target_name, layer, target)
        else:
            raise ValueError(
                f"{current_key} is a {type(target).__name__}; experts go on nn.Linear modules only. "
                "Leave it out of target_modules, or add it to exclude_modules."
            )


def _restore_base_model(model: nn.Module, groups: list[ProjectionGroup]) -> nn.Module:
    """Remove the hooks, free removed layers' copies of weights, and make converted modules plain again.

    All copies of weights that these layers have made are freed.
    """
    ForwardHooks.on(model).remove(model)
    for group in groups:
        group.clear_caches(include_frozen=True)
    for module in model.modules():
        restore_linear(module)
    return model
