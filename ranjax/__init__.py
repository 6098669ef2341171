from ranjax.scan import linear_recurrence as linear_recurrence
from ranjax.cell import RANCell as RANCell
from ranjax.layer import RAN as RAN
