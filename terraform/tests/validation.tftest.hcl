# What AWS would refuse half-way is refused before the first resource.

mock_provider "aws" {
  source = "./tests/mocks"
}

variables {
  stream_name = "ocs"
}

run "a_stream_name_with_a_space" {
  command         = plan
  expect_failures = [var.stream_name]
  variables { stream_name = "ocs messages" }
}

run "no_shards" {
  command         = plan
  expect_failures = [var.shard_count]
  variables { shard_count = 0 }
}

run "retention_of_an_hour" {
  command         = plan
  expect_failures = [var.retention_hours]
  variables { retention_hours = 1 }
}

run "retention_of_more_than_a_year" {
  command         = plan
  expect_failures = [var.retention_hours]
  variables { retention_hours = 8761 }
}

run "an_alias_for_a_key" {
  command         = plan
  expect_failures = [var.kms_key_arn]
  variables { kms_key_arn = "arn:aws:kms:us-east-1:123456789012:alias/tramline" }
}

run "an_upper_case_prefix" {
  command         = plan
  expect_failures = [var.name_prefix]
  variables { name_prefix = "Tramline-" }
}

run "an_application_named_too_shortly_for_its_table" {
  command         = plan
  expect_failures = [var.applications]
  variables { applications = { ab = {} } }
}

run "an_unknown_retrieval" {
  command         = plan
  expect_failures = [var.applications]
  variables { applications = { green = { retrieval = "auto" } } }
}

run "an_unknown_checkpoint" {
  command         = plan
  expect_failures = [var.applications]
  variables { applications = { green = { checkpoint = "file" } } }
}

run "unknown_dead_letters" {
  command         = plan
  expect_failures = [var.applications]
  variables { applications = { green = { dead_letters = "sqs" } } }
}

run "a_start_that_is_no_position" {
  command         = plan
  expect_failures = [var.applications]
  variables { applications = { green = { start = "noon" } } }
}

run "a_lease_table_without_leases" {
  command         = plan
  expect_failures = [var.applications]
  variables { applications = { green = { checkpoint = "none", lease_table = "leases" } } }
}

run "one_lease_table_for_two_applications" {
  command         = plan
  expect_failures = [var.applications]
  variables { applications = { green = {}, red = { lease_table = "green" } } }
}

run "a_policy_name_that_is_too_long" {
  command         = plan
  expect_failures = [var.applications]
  variables { applications = { a123456789a123456789a123456789a123456789a123456789a123456789a123456789a123456789a123456789a123456789a123456789 = {} } }
}

run "versions_of_no_day" {
  command         = plan
  expect_failures = [var.bucket]
  variables { bucket = { versions_days = 0 } }
}

run "dead_letters_of_an_hour" {
  command         = plan
  expect_failures = [var.dead_letter_retention_hours]
  variables { dead_letter_retention_hours = 1 }
}

run "a_firehose_that_waits_an_hour" {
  command         = plan
  expect_failures = [var.firehose]
  variables { firehose = { create = true, buffer_seconds = 3600 } }
}

run "a_silence_of_two_days" {
  command         = plan
  expect_failures = [var.alarms]
  variables { alarms = { create = true, silence_minutes = 2880 } }
}

run "an_alarm_to_a_mail_address" {
  command         = plan
  expect_failures = [var.alarms]
  variables { alarms = { create = true, actions = ["somebody@example.com"] } }
}
