"""UperNet as ConvNeXt V2 trained and tested it at 512 x 512 (its appendix A.4).

Swept were layer decay 0.8 and 0.9, lr 1e-4 to 3e-4 and drop path 0.1 to 0.4; what was chosen was not published. The lr,
the decay and their rule by stages are ConvNeXt's. The multi-scale test has scales of its own.
"""

_base_ = 'upernet_160k.py'

multiscale_factors = (0.75, 0.875, 1.0, 1.125, 1.25)
