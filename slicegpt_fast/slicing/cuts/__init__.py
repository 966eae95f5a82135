"""Cuts: delete rows and columns wherever it costs least.

``sensitivity`` takes statistics of the dense model; ``channels``, ``values`` and ``stream`` make of them a curve per
axis and layer, predicted loss against kept size, and say how a cut is made; ``allocation`` spends one budget on all.
"""
