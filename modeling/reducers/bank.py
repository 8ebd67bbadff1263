"""Which reducers a model has, and which act in one call.

`set_reducer` is the only way to change what a model has, and with it what is saved. A call may ask for any other
reducer; what it asks for is looked up, or made for this call alone, and never becomes part of the model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...configuration.configuration_adavtp import AdaVTPConfig, chosen_entries
from .base import REDUCERS, STAGES, TokenReducer, build_reducer

ReducerSpec = str | dict[str, Any] | list[str | dict[str, Any]]


class ImpossibleReducerError(ValueError):
    """A reducer that a model's family cannot have."""


class MissingWeightsError(ValueError):
    """A reducer has weights to learn, and the model has none for it."""


@dataclass
class Step:
    """
    One reducer of a stack, and the name of its entry there.

    Attributes:
        divides: the composite reducer that says how many tokens this part of it leaves, if it is not the last part.
    """

    name: str
    reducer: TokenReducer
    divides: TokenReducer | None = None


def stack_steps(reducers: Mapping[str, TokenReducer]) -> list[Step]:
    """
    The steps of a stack, composite reducers taken apart; a `ValueError` if they are not in the order of their stages,
    or two act inside the tower or the decoder.
    """
    steps = []
    for name, reducer in reducers.items():
        parts = list(getattr(reducer, "parts", [reducer]))
        steps += [Step(name, part, None if part is parts[-1] else reducer) for part in parts]
    stages = [step.reducer.stage for step in steps]
    shown = ", ".join(f"{step.name} ({step.reducer.stage})" for step in steps)
    if stages != sorted(stages, key=STAGES.index):
        raise ValueError(f"`reducers` is [{shown}]; reducers act in the order {', '.join(STAGES)}.")
    for stage in ("encoder", "decoder"):
        if stages.count(stage) > 1:
            raise ValueError(f"`reducers` is [{shown}]; one of stage {stage!r} is allowed.")
    return steps


class ReducerBank:
    """
    A view of a model's reducers, made anew whenever it is asked for, so that it sees a module that was wrapped or
    replaced.

    Args:
        config: the model's configuration; `reducers` is its stack, `trained_reducers` what else has weights.
        controller: the reducer `"adaptive"`, which every model has.
        reducers: the others that the model has, by name. Each knows its `parameters_given`.
        made: reducers without weights that calls have asked for, which later calls share; no part of the model.
        why_not: why a reducer cannot act on the model, or `None`.
    """

    def __init__(
        self,
        config: AdaVTPConfig,
        controller: TokenReducer,
        reducers: nn.ModuleDict,
        made: dict[tuple[Any, ...], TokenReducer],
        why_not: Callable[[TokenReducer], str | None],
    ) -> None:
        self.config, self.controller, self.reducers, self.made = config, controller, reducers, made
        self.why_not = why_not

    def steps(self, reducer: ReducerSpec | None = None, with_new_weights: bool = False) -> list[Step]:
        """
        What a stack (`None` is the configuration's) does one after another in one call. Nothing of the model changes,
        and no random number is drawn, except for `with_new_weights`.

        Args:
            reducer: the stack.
            with_new_weights: whether reducers get random weights, which are not kept, where the model has none.

        Raises:
            ValueError: if a name or a parameter is not known, the order is not that of the stages, or a reducer has
                weights that the model does not have or that were made for other parameters.
        """
        entries = self.config.reducers if reducer is None else chosen_entries(reducer)
        return stack_steps(
            {name: self._looked_up(name, given, with_new_weights) for name, given in map(named, entries)}
        )

    def set_reducer(self, reducer: ReducerSpec, **parameters: Any) -> None:
        """
        Chooses what selects the visual tokens from now on, and makes what the model lacks. New weights start from
        random values; a reducer that has weights keeps them.

        Args:
            reducer: a registered reducer's name; a dictionary of `"name"` and parameters; or a list of these, a stack
                in which each reducer gets what the one before left. `"adaptive"` is the model's own controller.
            parameters: of the reducer, where it is one name.

        Raises:
            ValueError: if a name or a parameter is not known, or the order of the stack is not that of its stages.
                Nothing has changed then.
        """
        if parameters and not isinstance(reducer, str):
            raise ValueError(
                f"Parameters {sorted(parameters)} were given with `reducer` {reducer!r}, which is no name."
            )
        entries = chosen_entries({"name": reducer, **parameters} if parameters else reducer)
        self.config.reducers = [entry_of(name, module) for name, module in self.add(entries).items()]

    def add(self, entries: list[str | dict[str, Any]]) -> dict[str, TokenReducer]:
        """Gives the model a stack's reducers, writes down which have weights, and returns their modules by name."""
        stack = {name: self._looked_up(name, given, new_weights=True) for name, given in map(named, entries)}
        stack_steps(stack)
        for name, module in stack.items():
            if name == "adaptive" or (name in self.reducers and self.reducers[name] is module):
                continue
            self.reducers[name] = module
            if module.state_dict():
                # What has weights is saved, so the configuration has to say that it is there.
                others = [entry for entry in self.config.trained_reducers if named(entry)[0] != name]
                self.config.trained_reducers = [*others, entry_of(name, module)]
        return stack

    def _looked_up(self, name: str, parameters: dict[str, Any], new_weights: bool = False) -> TokenReducer:
        """The module that the model has, or one that is made: with its weights, without any, or with new ones."""
        if name == "adaptive":
            if parameters:
                raise ValueError(
                    f"Reducer 'adaptive' takes no parameters, got {sorted(parameters)}; it has the configuration's."
                )
            return self.controller
        known = dict(self.reducers.items()).get(name)
        has_weights = known is not None and bool(known.state_dict())
        # A name alone is what is there already, where that has learned something.
        if known is not None and (known.parameters_given == parameters or (has_weights and not parameters)):
            return known
        if new_weights and not has_weights:
            return self._built(name, parameters)
        if has_weights:
            module = self._built_without_drawing(name, parameters)
            _share_weights(name, known, module)
            return module
        if name in REDUCERS and REDUCERS[name].trained:
            # What no model of this family can have says so first.
            self._built_without_drawing(name, parameters)
            raise _missing_weights(name, parameters)
        # In training some draw their choice. A mode that is part of the key need not be changed under another call.
        key = (REDUCERS.get(name), repr(parameters), self.controller.training)
        if key not in self.made:
            module = self._built_without_drawing(name, parameters)
            if module.state_dict():
                raise _missing_weights(name, parameters)
            self.made[key] = module
        return self.made[key]

    def _built_without_drawing(self, name: str, parameters: dict[str, Any]) -> TokenReducer:
        with torch.random.fork_rng(devices=[]):
            return self._built(name, parameters)

    def _built(self, name: str, parameters: dict[str, Any]) -> TokenReducer:
        like = next(self.controller.parameters())
        module = build_reducer(name, self.config, **parameters).to(device=like.device, dtype=like.dtype)
        module.parameters_given = parameters
        for part in getattr(module, "parts", [module]):
            if (reason := self.why_not(part)) is not None:
                raise ImpossibleReducerError(
                    f"Reducer {name!r} cannot act on a {self.config.model_type!r} model: {reason}"
                )
        return module.train(self.controller.training)


def named(entry: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the parameters of a reducer as a configuration writes it."""
    given = {"name": entry} if isinstance(entry, str) else dict(entry)
    return given.pop("name"), given


def entry_of(name: str, module: TokenReducer) -> str | dict[str, Any]:
    """A reducer as a configuration writes it; the reverse of [`named`]."""
    given = getattr(module, "parameters_given", {})
    return {"name": name, **given} if given else name


def _share_weights(name: str, known: TokenReducer, module: TokenReducer) -> None:
    """Gives a module the parameters of another, themselves and not copies, so that an optimizer goes on with them."""
    frozen = {key for key, parameter in known.named_parameters() if not parameter.requires_grad}
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(key not in frozen)
    try:
        module.load_state_dict(known.state_dict(keep_vars=True), assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"Reducer {name!r} has weights that were made for the parameters {known.parameters_given}, and they do "
            f"not fit {module.parameters_given}."
        ) from error
    module.train(known.training)


def _missing_weights(name: str, parameters: dict[str, Any]) -> MissingWeightsError:
    given = "".join(f", {key}={value!r}" for key, value in parameters.items())
    return MissingWeightsError(
        f"`reducer` is {name!r}, which has weights to learn, and this model has none for it. Load a checkpoint that "
        f"was trained with it, or call `model.set_reducer({name!r}{given})`, which starts from random weights, and "
        "train."
    )


def require_trained_controller(step: Step, config: AdaVTPConfig, training: bool) -> None:
    """
    That a controller which still has the random weights of its beginning chooses in training alone. One that learns
    has them no longer.

    Args:
        step: that is about to choose.
        config: of the model, which says whether it has them.
        training: whether the model is in training.

    Raises:
        MissingWeightsError: if it has and is not.
    """
    if step.name != "adaptive" or not config.untrained_controller:
        return
    weights = list(step.reducer.parameters())
    if training and any(weight.requires_grad for weight in weights):
        config.untrained_controller = False
    # Without any weights costs are counted, which do not depend on them.
    elif not training and not weights[0].is_meta:
        raise MissingWeightsError(
            f"{config.name_or_path!r} has no weights for the reducer 'adaptive', which would choose at random. Train "
            "it, or name a reducer that needs no training, such as 'divprune'. To measure it nevertheless set "
            "`model.config.untrained_controller = False`."
        )
