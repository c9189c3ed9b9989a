"""From a raw dataset to preprocessed cases: integrity, fingerprint, plans, preprocessing, budget of labelled cases."""
