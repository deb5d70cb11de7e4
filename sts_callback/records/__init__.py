"""Results as frozen, plain Python objects, written to and read from JSON."""

from sts_callback.records.record import Record as Record
from sts_callback.records.results import POWER as POWER
from sts_callback.records.results import TRAIN as TRAIN
from sts_callback.records.results import UNKNOWN as UNKNOWN
from sts_callback.records.results import Check as Check
from sts_callback.records.results import Decision as Decision
from sts_callback.records.results import DomainDrift as DomainDrift
from sts_callback.records.results import DomainForecast as DomainForecast
from sts_callback.records.results import DriftSnapshot as DriftSnapshot
from sts_callback.records.results import Estimate as Estimate
from sts_callback.records.results import Forecast as Forecast
from sts_callback.records.results import Identity as Identity
from sts_callback.records.results import Score as Score
from sts_callback.records.results import Snippet as Snippet
from sts_callback.records.results import State as State
from sts_callback.records.results import Status as Status
from sts_callback.records.results import TokenAccuracy as TokenAccuracy
from sts_callback.records.results import TopActivatingExamples as TopActivatingExamples
from sts_callback.records.results import TrainSource as TrainSource
from sts_callback.records.results import Verdict as Verdict
from sts_callback.records.results import downwards as downwards
from sts_callback.records.results import harm_in as harm_in
from sts_callback.records.results import in_capitals as in_capitals
