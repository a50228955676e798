"""`vsd demo`: drafters of the embedded target, trained and measured within minutes."""

from vsd.demo.logs import demo as demo
from vsd.demo.scratch import from_scratch as from_scratch
