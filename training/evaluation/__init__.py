"""Evaluation on labelled images: k nearest neighbours, a linear probe, and a classifier's accuracy and confusions.

`knn`, `linear` and `confusion` compute on tensors, those of one call on one device, and know neither images nor
networks; `embed`, `labelled`, `probe` and `evaluate` run networks on images.
"""
