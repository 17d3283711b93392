package consumers

import "ordersaga/events"

// GroupName names a consumer group, for rooms that know this one and not events.
type GroupName = events.Group
