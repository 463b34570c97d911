"""A set of sites, edits and subspaces as one `nn.Module`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from fmr.edits.editor import Asked, entries
from fmr.edits.values import Edit, Interchange
from fmr.errors import EditError, number_of
from fmr.ids import Site
from fmr.interventions.files import fetched, read_folder, upload, write_folder
from fmr.interventions.roles import found_again
from fmr.runs.run import Run
from fmr.runs.track import run, track
from fmr.structure.parts import Structure

if TYPE_CHECKING:
    from typing import Self


class Intervention(nn.Module):
    """Edits at sites as one module, whose parameters are those of its subspaces: it runs a model, trains, and is saved.

    >>> site, rotation = structure.layers[2].resid_post.at(positions=-1), subspaces.Rotation(128, 8)
    >>> swap = fmr.Intervention({site: edits.Interchange("other", within=rotation)})
    >>> swap.run(model, input_ids, sources={"other": source_ids}).output.logits.mean().backward()

    edits: what to change, by site, as for `fmr.run`. The source of an `Interchange` may be a name, which each run fills in.
    The model's weights stay as they are, and none is a parameter here; `model.requires_grad_(False)` spares it the gradients
    that `backward` would leave there.
    """

    def __init__(self, edits: Asked) -> None:
        super().__init__()
        asked: dict[Site, tuple[Edit, ...]] = {}
        for entry in entries(edits):
            asked[entry.site] = (*asked.get(entry.site, ()), entry.edit)
        self._asked = asked
        given = [part for several in asked.values() for edit in several for part in _parts(edit)]
        self._named = {site: tuple(map(self._kept, several)) for site, several in asked.items()}
        self.parts = nn.ModuleList(dict.fromkeys(part for part in given if isinstance(part, nn.Module)))
        self.vectors = nn.ParameterList(dict.fromkeys(part for part in given if isinstance(part, nn.Parameter)))

    @property
    def edits(self) -> dict[Site, tuple[Edit, ...]]:
        """The edits by site, with the tensors that the module holds now: it may have been moved, or have loaded others."""
        pairs = ((site, zip(several, self._named[site], strict=True)) for site, several in self._asked.items())
        return {site: tuple(self._held(edit, names) for edit, names in several) for site, several in pairs}

    def _kept(self, edit: Edit) -> dict[str, str]:
        """Keep the tensors of an edit as buffers, each once; by field the name of its own."""
        found: dict[str, str] = {}
        if not is_dataclass(edit):
            return found
        for one in fields(edit):
            value = getattr(edit, one.name)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                known = (name for name, held in self._buffers.items() if held is value)
                found[one.name] = next(known, f"values_{len(self._buffers)}")
                self.register_buffer(found[one.name], value)
        return found

    def _held(self, edit: Edit, names: Mapping[str, str]) -> Edit:
        """An edit with its tensors as they are now."""
        return replace(edit, **{field: self._buffers[name] for field, name in names.items()}) if names else edit  # type: ignore[type-var]

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources that a run has to fill in."""
        every = [edit for several in self.edits.values() for edit in several]
        return tuple(dict.fromkeys(edit.source for edit in every if _is_named(edit)))

    def asked(self, sources: Mapping[str, Any] | None = None) -> Asked:
        """The edits with these sources in the places of their names, as `fmr.run(edits=...)` and `fmr.sweep` take them."""
        if sources is not None and not isinstance(sources, Mapping):
            raise EditError(
                f"sources is a {type(sources).__name__}, expected a run or inputs for each name: "
                "sources={'other': inputs}."
            )
        given = dict(sources or {})
        if sorted(given) != sorted(self.sources):
            wanted = ", ".join(map(repr, self.sources)) or "none"
            raise EditError(
                f"The intervention got sources {', '.join(map(repr, given)) or 'none'}, expected {wanted}: "
                f"sources={{name: run or inputs}}."
            )
        return {site: [_filled(edit, given) for edit in several] for site, several in self.edits.items()}

    def run(
        self,
        model: nn.Module,
        *args: Any,
        sources: Mapping[str, Any] | None = None,
        grad: bool | None = None,
        **kwargs: Any,
    ) -> Run:
        """Call a model once with the edits; the run keeps what they act on unless `keep` says more.

        >>> swap = fmr.Intervention({site: edits.Interchange("other")})
        >>> swap.run(model, input_ids, sources={"other": source_ids}).receipts
        Site('transformer.h.1.mlp...'): Receipt: fired 1 time, changed ... elements by ... (L2 norm)

        sources: a run or inputs of the model for each name. grad: keep the autograd history; by default where gradients are
        on and the intervention has parameters that are trained. All else is as for `fmr.run`.
        """
        if grad is None:
            grad = torch.is_grad_enabled() and any(one.requires_grad for one in self.parameters())
        return run(model, *args, edits=self.asked(sources), grad=grad, **{"keep": (), **kwargs})

    def forward(self, model: nn.Module, *args: Any, sources: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """What the model returns with the edits."""
        return self.run(model, *args, sources=sources, **kwargs).output

    @contextmanager
    def on(self, model: nn.Module, sources: Mapping[str, Any] | None = None) -> Iterator[Run]:
        """Every call of the model in the block runs with the edits, those of `generate` too.

        >>> with fmr.Intervention({site: edits.Add(direction)}).on(model):
        ...     model.generate(input_ids, max_new_tokens=8)
        """
        with track(model, keep=(), edits=self.asked(sources)) as made:
            yield made

    def save(self, folder: str | os.PathLike[str], structure: Structure | None = None) -> None:
        """Write the intervention to a folder, as JSON and safetensors; nothing in them is executed on loading.

        >>> fmr.Intervention({site: edits.Add(direction)}).save("steering", fmr.locate(run))

        structure: of the model that it was made for. With it each site is kept by its role, too, as attention[3].z, so that
        it is found again in another release, under another kernel, or in a copy with adapters.
        """
        write_folder(folder, self.edits, structure)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], structure: Structure | None = None) -> Self:
        """Read an intervention that was saved; with a structure its sites are those of that model.

        >>> fmr.Intervention({site: edits.Add(direction)}).save("steering", structure)
        >>> fmr.Intervention.load("steering", fmr.locate(fused))
        Intervention of 1 edit, 0 trained numbers:
          Site('transformer.h.1.mlp...'): Add(addend=tensor of shape (128,))

        `EditError` where the model has no such site, or one of another width: it says which, and what there is.
        """
        saved = read_folder(folder)
        found = saved.edits if structure is None else found_again(saved, structure)
        return cls(dict(found.items()))

    def push_to_hub(self, name: str, structure: Structure | None = None, **settings: Any) -> str:
        """Save to a repository of the Hugging Face hub, which is made where there is none; its address.

        >>> steering.push_to_hub("me/steering", fmr.locate(run), private=True)  # doctest: +SKIP

        settings: of `huggingface_hub.HfApi.create_repo`, as private= and token=.
        """
        return upload(name, lambda folder: self.save(folder, structure), settings)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], structure: Structure | None = None, **settings: Any) -> Self:
        """Load from a folder, or from a repository of the Hugging Face hub.

        >>> steering = fmr.Intervention.from_pretrained("me/steering", fmr.locate(run))  # doctest: +SKIP

        settings: of `huggingface_hub.snapshot_download`, as revision= and token=.
        """
        return cls.load(fetched(name, settings), structure)

    def __repr__(self) -> str:
        told = [f"\n  {site!r}: {edit!r}" for site, several in self.edits.items() for edit in several]
        trained = sum(one.numel() for one in self.parameters())
        return f"Intervention of {number_of(len(told), 'edit')}, {trained} trained numbers:{''.join(told)}"


def _parts(edit: Edit) -> list[object]:
    """What an edit is made of."""
    return [edit] if not is_dataclass(edit) else [getattr(edit, one.name) for one in fields(edit)]


def _is_named(edit: Edit) -> TypeGuard[Interchange]:
    """Whether an edit takes a source that each run fills in."""
    return isinstance(edit, Interchange) and isinstance(edit.source, str)


def _filled(edit: Edit, sources: Mapping[str, Any]) -> Edit:
    """An interchange with the source that its name stands for."""
    return replace(edit, source=sources[edit.source]) if _is_named(edit) else edit
