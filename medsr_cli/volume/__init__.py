"""What a volume is: an array, where it lies in the patient, and what its numbers mean. numpy only."""
