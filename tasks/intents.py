"""Names of the intents of BANKING77 and CLINC150, as their publishers write them."""

from __future__ import annotations

# arXiv 2003.04807, CC BY 4.0
BANKING77 = tuple(
    """
    Refund_not_showing_up activate_my_card age_limit apple_pay_or_google_pay atm_support automatic_top_up
    balance_not_updated_after_bank_transfer balance_not_updated_after_cheque_or_cash_deposit
    beneficiary_not_allowed cancel_transfer card_about_to_expire card_acceptance card_arrival
    card_delivery_estimate card_linking card_not_working card_payment_fee_charged card_payment_not_recognised
    card_payment_wrong_exchange_rate card_swallowed cash_withdrawal_charge cash_withdrawal_not_recognised
    change_pin compromised_card contactless_not_working country_support declined_card_payment
    declined_cash_withdrawal declined_transfer direct_debit_payment_not_recognised disposable_card_limits
    edit_personal_details exchange_charge exchange_rate exchange_via_app extra_charge_on_statement
    failed_transfer fiat_currency_support get_disposable_virtual_card get_physical_card getting_spare_card
    getting_virtual_card lost_or_stolen_card lost_or_stolen_phone order_physical_card passcode_forgotten
    pending_card_payment pending_cash_withdrawal pending_top_up pending_transfer pin_blocked receiving_money
    request_refund reverted_card_payment? supported_cards_and_currencies terminate_account
    top_up_by_bank_transfer_charge top_up_by_card_charge top_up_by_cash_or_cheque top_up_failed top_up_limits
    top_up_reverted topping_up_by_card transaction_charged_twice transfer_fee_charged transfer_into_account
    transfer_not_received_by_recipient transfer_timing unable_to_verify_identity verify_my_identity
    verify_source_of_funds verify_top_up virtual_card_not_working visa_or_mastercard why_verify_identity
    wrong_amount_of_cash_received wrong_exchange_rate_for_cash_withdrawal
    """.split()
)

# arXiv 1909.02027, CC BY 3.0: 15 intents in each of ten domains, in alphabetical order
CLINC150 = {
    "auto_and_commute": tuple(
        """
        current_location directions distance gas gas_type jump_start last_maintenance mpg oil_change_how
        oil_change_when schedule_maintenance tire_change tire_pressure traffic uber
        """.split()
    ),
    "banking": tuple(
        """
        account_blocked balance bill_balance bill_due freeze_account interest_rate min_payment order_checks pay_bill
        pin_change report_fraud routing spending_history transactions transfer
        """.split()
    ),
    "credit_cards": tuple(
        """
        application_status apr card_declined credit_limit credit_limit_change credit_score damaged_card
        expiration_date improve_credit_score international_fees new_card redeem_rewards replacement_card_duration
        report_lost_card rewards_balance
        """.split()
    ),
    "home": tuple(
        """
        calendar calendar_update next_song order order_status play_music reminder reminder_update shopping_list
        shopping_list_update smart_home todo_list todo_list_update update_playlist what_song
        """.split()
    ),
    "kitchen_and_dining": tuple(
        """
        accept_reservations calories cancel_reservation confirm_reservation cook_time food_last how_busy
        ingredient_substitution ingredients_list meal_suggestion nutrition_info recipe restaurant_reservation
        restaurant_reviews restaurant_suggestion
        """.split()
    ),
    "meta": tuple(
        """
        cancel change_accent change_ai_name change_language change_speed change_user_name change_volume maybe no
        repeat reset_settings sync_device user_name whisper_mode yes
        """.split()
    ),
    "small_talk": tuple(
        """
        are_you_a_bot do_you_have_pets fun_fact goodbye greeting how_old_are_you meaning_of_life tell_joke thank_you
        what_are_your_hobbies what_can_i_ask_you what_is_your_name where_are_you_from who_do_you_work_for
        who_made_you
        """.split()
    ),
    "travel": tuple(
        """
        book_flight book_hotel car_rental carry_on exchange_rate flight_status international_visa lost_luggage
        plug_type timezone translate travel_alert travel_notification travel_suggestion vaccines
        """.split()
    ),
    "utility": tuple(
        """
        alarm calculator date definition find_phone flip_coin make_call measurement_conversion roll_dice
        share_location spelling text time timer weather
        """.split()
    ),
    "work": tuple(
        """
        direct_deposit income insurance insurance_change meeting_schedule next_holiday payday pto_balance
        pto_request pto_request_status pto_used rollover_401k schedule_meeting taxes w2
        """.split()
    ),
}
