//! Wall-clock time, as numbers and as RFC3339Nano text.

use rustix::time::{ClockId, clock_gettime};

/// Length of the text: `2016-10-06T00:17:09.669794202Z`.
pub(super) const LENGTH: usize = 30;

const SECONDS_OF_DAY: i64 = 86_400;
/// Days from 0000-03-01 to 1970-01-01 in the proleptic Gregorian calendar.
const EPOCH_DAYS: i64 = 719_468;
const DAYS_OF_400_YEARS: i64 = 146_097;

/// Nanoseconds of wall-clock time since 1970.
pub fn now() -> i64 {
    let time = clock_gettime(ClockId::Realtime);
    time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec)
}

/// The time in UTC with nine digits after the second, as in CRI log files. Years are taken to have four digits.
pub fn rfc3339(nanoseconds: i64) -> [u8; LENGTH] {
    let seconds = nanoseconds.div_euclid(1_000_000_000);
    let (year, month, day) = civil(seconds.div_euclid(SECONDS_OF_DAY));
    let second = seconds.rem_euclid(SECONDS_OF_DAY);
    let mut text = *b"0000-00-00T00:00:00.000000000Z";
    digits(&mut text[0..4], year);
    digits(&mut text[5..7], month);
    digits(&mut text[8..10], day);
    digits(&mut text[11..13], second / 3600);
    digits(&mut text[14..16], second / 60 % 60);
    digits(&mut text[17..19], second % 60);
    digits(&mut text[20..29], nanoseconds.rem_euclid(1_000_000_000));
    text
}

fn digits(text: &mut [u8], mut number: i64) {
    for digit in text.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

/// Year, month and day of a day counted from 1970-01-01. Years begin in March here, so that the leap day is the last
/// of its year; then 153 days are five months everywhere.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + EPOCH_DAYS;
    let era = days.div_euclid(DAYS_OF_400_YEARS);
    let day_of_era = days.rem_euclid(DAYS_OF_400_YEARS);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(nanoseconds: i64) -> String {
        String::from_utf8(rfc3339(nanoseconds).to_vec()).unwrap()
    }

    #[test]
    fn known_times_have_their_known_text() {
        assert_eq!(text(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(text(1_475_713_029_669_794_202), "2016-10-06T00:17:09.669794202Z");
        assert_eq!(text(951_782_400_000_000_001), "2000-02-29T00:00:00.000000001Z");
        assert_eq!(text(1_709_251_199_999_999_999), "2024-02-29T23:59:59.999999999Z");
        assert_eq!(text(4_107_542_400_000_000_000), "2100-03-01T00:00:00.000000000Z");
        assert_eq!(text(-1), "1969-12-31T23:59:59.999999999Z");
    }

    #[test]
    fn every_day_of_four_centuries_follows_the_one_before() {
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for number in 0..DAYS_OF_400_YEARS {
            assert_eq!(civil(number), (year, month, day));
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length = match month {
                2 => 28 + i64::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            day += 1;
            if day > length {
                (day, month) = (1, month + 1);
            }
            if month > 12 {
                (month, year) = (1, year + 1);
            }
        }
    }
}
