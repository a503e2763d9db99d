"""The PEFT tuner that adapts the linear layers of a model.

It saves and loads through PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import nn

from malora.adapter_layer import PREFIX, AdapterLayer
from malora.adapter_names import assign_rows, make_rows
from malora.config import MaloraConfig
from malora.forward_hooks import AUX_LOSS_WEIGHT, ForwardHooks
from malora.fused.fp8_linear import restore_linear
from malora.fused.group import PROJECTION_GROUPS, ProjectionGroup
from malora.layer import LINEAR_TYPES, MaloraLayer
from malora.parameter_layer import ParamWrapper, check_target_parameters
from malora.routing import RoutingLog
from malora.targets import TARGET_MODULES
from malora.weighted_adapter import Summand, combine, combined_rank


class MaloraModel(BaseTuner):
    """A model whose targeted linear modules and parameters have experts.

    `peft.get_peft_model` makes it.

    Raises:
        ValueError: a target matches nothing, a module that is not linear, or a parameter that is no matrix; the message
            names what there is.
    """

    prefix = PREFIX
    tuner_layer_cls = AdapterLayer
    target_module_mapping = TARGET_MODULES  # type: ignore[assignment]  # PEFT has regular expressions in its own too

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
        hooks.find_layers(model)
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

    def _check_merge_allowed(self) -> None:
        """Refuse a merge before any layer has changed."""
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]
        for layer in self.malora_layers:
            layer.check_mergeable()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Let each row of the batch use the adapter that `adapter_names` gives it, in `forward` and `generate`.

        Args:
            args: Positional arguments of the call.
            kwargs: Its other arguments, with PEFT's own among them.

        Raises:
            TypeError: `adapter_names` is not a list of names.
            ValueError: `adapter_names` has an unknown adapter, or one is merged; or the call has `alora_offsets`.
        """
        if kwargs.get("alora_offsets") is not None:
            raise ValueError(
                "alora_offsets= is not supported by malora: an adapter sees all tokens of its rows. Leave it out."
            )
        if (names := kwargs.get("adapter_names")) is None:
            yield
            return
        with assign_rows(self.model, self.routing_log, make_rows(self.model, names, kwargs)):
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter that is a weighted sum of others, as in PEFT's LoRA.

        Args:
            adapters: names of adapters without a router.
            weights: weight of each.
            adapter_name: name of the sum. It is not activated.
            combination_type: "cat", "svd" or "linear"; see `malora.weighted_adapter.combined_rank`.
            svd_rank: rank of "svd"; by default the largest rank of the adapters.

        Raises:
            ValueError: an adapter does not exist, has a router, or trains more than its experts; or the name is taken.
        """
        config = self._check_summands(adapters, weights, adapter_name)
        layers = [layer for layer in self.malora_layers if layer.settings.keys() & set(adapters)]
        ranks = [max(layer.settings[name].r for layer in layers if name in layer.settings) for name in adapters]
        rank = combined_rank(combination_type, ranks, svd_rank)
        self.peft_config[adapter_name] = replace(
            config, r=rank, lora_alpha=rank, down="A_t", up="B_t", d=None, beta=1.0, same_start=False, freeze=[],
            target_modules={layer.name for layer in layers}, layers_to_transform=None, layers_pattern=None,
            rank_pattern={}, alpha_pattern={}, use_rslora=False, init_weights=True,
        )  # fmt: skip
        self.inject_adapter(self.model, adapter_name)
        for layer in layers:
            summands = [
                Summand(weight, layer.settings[name].scaling, layer.factors(name))
                for name, weight in zip(adapters, weights, strict=True)
                if name in layer.settings
            ]
            A, B = (factor for factor in layer.factors(adapter_name) if factor is not None)
            for factor, value in zip((A, B), combine(combination_type, summands, rank), strict=True):
                padded = value.new_zeros(factor.shape)
                padded[0, : len(value)] = value
                factor.data = padded

    def _check_summands(self, adapters: list[str], weights: list[float], adapter_name: str) -> MaloraConfig:
        """Return the config of the first of some adapters if their sum has a meaning."""
        if adapter_name in self.peft_config:
            raise ValueError(f"there is already an adapter {adapter_name!r}; choose another name for the sum.")
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"adapters {unknown} do not exist; choose from {list(self.peft_config)}.")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"{len(adapters)} adapters and {len(weights)} weights: give at least one adapter, and a weight each."
            )
        configs = [cast("MaloraConfig", self.peft_config[name]) for name in adapters]
        for name, config in zip(adapters, configs, strict=True):
            if config.has_router:
                raise ValueError(
                    f"adapter {name!r} routes tokens among {config.num_experts} experts: its change depends on the "
                    "input, so it cannot be summed with others."
                )
            if config.num_experts > 1:
                raise ValueError(
                    f"adapter {name!r} has {config.num_experts} experts with uniform gates, and only adapters with one "
                    "expert can be summed. Merge it into the base instead."
                )
            if config.modules_to_save or config.trainable_token_indices or config.bias != "none":
                raise ValueError(
                    f"adapter {name!r} trains more than its experts (modules_to_save, trainable_token_indices or "
                    "bias), which cannot be summed."
                )
            if config.target_parameters:
                raise ValueError(
                    f"add_weighted_adapter does not support targeting nn.Parameter: adapter {name!r} has "
                    f"target_parameters={config.target_parameters}."
                )
        return configs[0]

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        """Refuse an adapter on other parameters than an earlier one.

        The names of saved factors say by which wrapper around a module they are, and not of which parameter.
        """
        super()._check_new_adapter_config(config)
        targets = set(getattr(config, "target_parameters", None) or ())
        for name, other in self.peft_config.items():
            others = set(getattr(other, "target_parameters", None) or ())
            if other is not config and targets and others and targets != others:
                raise ValueError(
                    "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                    f"parameters: {sorted(targets)} are not {sorted(others)} of adapter {name!r}."
                )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep frozen factors frozen.

        PEFT 0.21.2 makes new parameters here, all of them trainable.
        """
        trains = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trains[name])

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        """Choose the default targets of the model's type if the user named none.

        A type without defaults is fine if the user named parameters.

        Raises:
            ValueError: the type is unknown, or its targets cannot be limited to some layers.
        """
        assert isinstance(peft_config, MaloraConfig)
        if peft_config.target_modules is None:
            model_type = model_config.get("model_type")
            if model_type not in TARGET_MODULES and peft_config.target_parameters:
                return peft_config
            if model_type not in TARGET_MODULES:
                raise ValueError(
                    "Please specify `target_modules` in `peft_config`: no default targets are known for models of type "
                    f"{model_type!r}. Give names of linear modules, such as {_linear_names(self.model)}."
                )
            defaults = TARGET_MODULES[model_type]
            # Variants of a type may lack some names.
            names = defaults if isinstance(defaults, str) else set(defaults) - set(self._missing(defaults))
            peft_config.target_modules = names
            peft_config.check_layers()  # the default may be a regular expression
        return peft_config

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        """Refuse modules whose weight is read and that are not called, such as Mamba's `out_proj`.

        PEFT knows them, and refuses them for its LoRA only.
        """
        super()._check_target_module_compatiblity(LoraConfig(), model, target_name)

    def _missing(self, targets: Iterable[str]) -> list[str]:
        """Return the targets that match no module of the model."""
        names = [name for name, _ in self.model.named_modules()]
        return [target for target in sorted(targets) if not _matches(target, names)]

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Refuse targets that match nothing, before PEFT replaces anything."""
        assert isinstance(peft_config, MaloraConfig)
        check_target_parameters(model, peft_config.target_parameters or ())
        targets = peft_config.target_modules
        if isinstance(targets, str) or targets is None:
            return  # a regular expression, or "all-linear"; PEFT says so if it matches nothing
        missing = self._missing(targets)
        if fused := [t for t in missing if _matches(t, (name for name, _ in model.named_parameters()))]:
            raise ValueError(
                f"target_modules {fused} are parameters of this {type(model).__name__} and no modules, as the fused "
                "expert weights of transformers 5 are. Name them in target_parameters, which needs a method without a "
                "router, or leave them out."
            )
        if missing:
            raise ValueError(
                f"target_modules {missing} match nothing in this {type(model).__name__}. "
                f"Its linear modules are called {_linear_names(model)}; name some of these."
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

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in the place of another.

        PEFT would move the factors to the device of the base's weight, which is "meta" while accelerate offloads it.
        And it would give a plain module the weight of the wrapper that it replaces, which fails for embeddings of
        which some tokens are trained.
        """
        setattr(parent, child_name, new_module)

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
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{current_key} cannot be adapted: nn.MultiheadAttention reads its weight and does not call it. Add it "
                "to exclude_modules."
            )
        for cached in ("malora_layers", "_groups"):
            self.__dict__.pop(cached, None)
        restore_linear(target)
        if isinstance(target, AdapterLayer) and getattr(target, "parameter_name", None) == parameter_name:
            target.update_layer(adapter_name, peft_config)
            return
        layer = self._make_layer(target, current_key, parameter_name)
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def _make_layer(self, target: nn.Module, key: str, parameter_name: str | None) -> AdapterLayer:
        """Return a layer around a module, without adapters yet."""
        if parameter_name is not None:
            return ParamWrapper(target, parameter_name, key)
        if _is_linear(target):
            layer = MaloraLayer(target, key, self.routing_log, self._group_of(key))
            layer.quantization_backend = _quantization_backend(target, self.model)
            return layer
        raise ValueError(
            f"{key} is a {type(target).__name__}; experts go on nn.Linear and Conv1D modules, and on those that "
            "gptqmodel quantized. Leave it out of target_modules, or add it to exclude_modules."
        )


def _quantization_backend(linear: nn.Module, model: nn.Module) -> QuantizationBackend | None:
    """Return PEFT's way to change a quantized weight, or None if the weight is plain."""
    try:
        return resolve_quantization_backend(linear, **get_quantization_kwargs(model))
    except ValueError:  # the model does not say how its weights were quantized, so they cannot be quantized again
        return ForwardOnlyQuantizationBackend("torchao")


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer that experts can be added to.

    The quantized ones of gptqmodel are no `nn.Linear`.
    """
    if isinstance(module, LINEAR_TYPES):
        return True
    backend = _quantization_backend(module, module)
    return backend is not None and backend.backend_name == "gptq"


def _matches(target: str, names: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _linear_names(model: nn.Module) -> list[str]:
    """Return the last parts of the names of a model's linear modules."""
    linear = (name for name, module in model.named_modules() if isinstance(module, MaloraLayer) or _is_linear(module))
    return sorted({name.rpartition(".")[2] for name in linear} - {"base_layer"})


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
