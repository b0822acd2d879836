"""What all tests share."""

import logging

# pytest keeps whatever is logged, and torch.compile logs each step of its tracing where it sees that somebody does: it
# then takes several times as long.
logging.getLogger('torch.__trace').propagate = False
