"""The sections of the report, in order. A new one is a file here and an entry in `SECTIONS`."""

from __future__ import annotations

from steer.lens.sections.attention import AttentionMaps
from steer.lens.sections.base import Section
from steer.lens.sections.baselines import TunedBaselines
from steer.lens.sections.composition import Composition
from steer.lens.sections.conventions import Conventions
from steer.lens.sections.directions import Directions
from steer.lens.sections.downstream import Downstream
from steer.lens.sections.entropy import Entropy
from steer.lens.sections.languages import Languages
from steer.lens.sections.last_layers import LastLayers
from steer.lens.sections.layers import Layers
from steer.lens.sections.logit_lens import LogitLens
from steer.lens.sections.pair_correlation import PairCorrelation
from steer.lens.sections.paths import PathPatching
from steer.lens.sections.persistence import Persistence
from steer.lens.sections.prefix import Prefix
from steer.lens.sections.scales import Scales
from steer.lens.sections.spectrum import Spectrum
from steer.lens.sections.token_shift import TokenShifts

SECTIONS: tuple[Section, ...] = (
    Directions(),
    Spectrum(),
    LogitLens(),
    Languages(),
    Downstream(),
    TokenShifts(),
    Entropy(),
    Prefix(),
    PathPatching(),
    LastLayers(),
    AttentionMaps(),
    Persistence(),
    Layers(),
    TunedBaselines(),
    Composition(),
    PairCorrelation(),
    Scales(),
    Conventions(),
)
